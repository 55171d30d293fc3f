"""Loading a model by a folder, an id or a factory: only tensors are unpickled, and each mistake is a sentence."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bert import SIZES, bert_config, save, tokenizer
from releases import TRANSFORMERS, VIT_IMAGE_PROCESSOR
from torch import nn

pytest.importorskip("transformers", reason="folders and ids are transformers'")

import transformers

from activation_extractor.cli import _transformers
from activation_extractor.cli._models import Loaded, example_batch, load_model
from activation_extractor.errors import ArgumentError, ArgumentTypeError, MissingExtraError

KINDS = "model must be a folder with a config.json, the id of a transformers model, or 'package.module:factory'"


@pytest.fixture
def bert(tmp_path) -> Path:
    torch.manual_seed(0)
    return save(transformers.BertModel(bert_config()), tmp_path / "bert", tokenizer(pad_token="[PAD]"))


def test_a_folder_gives_the_model_in_eval_with_its_tokenizer_and_says_nothing(bert, capfd):
    loaded = load_model(bert)
    assert type(loaded.model).__name__ == "BertModel"
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.prepare(["Hello world."])["input_ids"] == [[2, 3]]
    assert (loaded.name, loaded.notes) == (str(bert), ())
    saved = transformers.BertModel.from_pretrained(bert).state_dict()
    capfd.readouterr()
    load_model(str(bert))
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(value, saved[name]) for name, value in loaded.model.state_dict().items())


def test_loading_leaves_transformers_as_talkative_as_it_was(bert):
    chatter = transformers.utils.logging
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    try:
        chatter.set_verbosity_info()
        chatter.enable_progress_bar()
        load_model(bert)
        assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        chatter.set_verbosity(before[0])


class Reports(logging.Handler):
    """What transformers logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_weights_that_were_not_saved_are_a_note(tmp_path):
    folder = save(transformers.BertForMaskedLM(bert_config()), tmp_path, tokenizer(pad_token="[PAD]"))
    note = "Random numbers stand for what is not among the saved weights: 'pooler.dense.bias', 'pooler.dense.weight'."
    reports = Reports()
    logger = logging.getLogger("transformers")
    logger.addHandler(reports)
    try:
        assert load_model(folder).notes == (note,)
    finally:
        logger.removeHandler(reports)
    assert reports.texts == []  # the note is all that is said


def test_a_model_without_its_tokenizer_has_a_note_rather_than_an_empty_one(tmp_path):
    loaded = load_model(save(transformers.BertModel(bert_config()), tmp_path))
    assert loaded.prepare is None
    why = r"it has no vocabulary" if TRANSFORMERS >= (5, 0) else ".+"
    (note,) = loaded.notes
    assert re.fullmatch(rf"No tokenizer was loaded with it \({why}\)\.", note)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("trust", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, trust):
    bert_config().save_pretrained(tmp_path)
    torch.save({"pooler.dense.bias": Malicious(tmp_path / "was-run")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArgumentError) as caught:
        load_model(tmp_path, trust_remote_code=trust)
    assert str(caught.value) == (
        f"model must have weights that hold tensors alone, got {str(tmp_path)!r}. "
        "Other objects in them are never unpickled: convert them to safetensors."
    )
    assert not (tmp_path / "was-run").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "was-run").exists()  # it would have been


def test_safetensors_come_before_a_pickle(bert):
    torch.save({"pooler.dense.bias": Malicious(bert / "was-run")}, bert / "pytorch_model.bin")
    assert load_model(bert).notes == ()
    assert not (bert / "was-run").exists()


def own_code(folder: Path) -> Path:
    """A model of a type that transformers does not know, with its code."""
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("from pathlib import Path\n(Path(__file__).parent / 'was-run').touch()\n")
    return folder


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("it asked on stdin"))
    with pytest.raises(ArgumentError) as caught:
        load_model(own_code(tmp_path))
    assert str(caught.value) == (
        f"model must run without code of its own, got {str(tmp_path)!r}. "
        "Read that code, then pass trust_remote_code=True."
    )
    assert not (tmp_path / "was-run").exists()


def test_a_model_has_code_of_its_own_where_its_config_lists_it_not_where_an_error_names_the_option(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "trust_remote_code"}')
    with pytest.raises(ArgumentError, match="^model must be one that transformers loads"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_an_unknown_id_is_one_sentence(name):
    with pytest.raises(ArgumentError) as caught:
        load_model(name)
    reason = "There is no such folder, it is not in the cache, and HF_HUB_OFFLINE is set."
    assert str(caught.value) == f"{KINDS}, got {name!r}. {reason}"


def test_what_is_no_id_at_all_is_one_sentence(tmp_path):
    for name, reason in [
        ("a b", "There is no such folder."),
        (str(tmp_path / "absent"), "There is no such folder."),
        (str(tmp_path), "The folder holds no config.json."),
    ]:
        with pytest.raises(ArgumentError) as caught:
            load_model(name)
        assert str(caught.value) == f"{KINDS}, got {name!r}. {reason}"
    with pytest.raises(ArgumentTypeError, match=r"^model must be a folder .*, got 3\.$"):
        load_model(3)


def test_a_folder_that_transformers_cannot_load_is_one_sentence(tmp_path):
    bert_config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArgumentError) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"model must be one that transformers loads, got {str(tmp_path)!r}. ")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ArgumentError, match="has model type `mine` but Transformers does not recognize"):
        load_model(tmp_path)


def test_without_transformers_the_error_says_what_to_install(bert, monkeypatch):
    monkeypatch.setattr(_transformers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs transformers, which is not installed"):
        load_model(bert)
    assert isinstance(load_model("torch.nn:ReLU").model, nn.ReLU)


def test_the_dtype_of_a_folder_is_the_one_that_was_asked_for(bert):
    for dtype in (None, "auto", "float32"):
        assert load_model(bert, dtype=dtype).model.dtype == torch.float32
    for dtype in ("bfloat16", "float16"):
        assert load_model(bert, dtype=dtype).model.dtype == getattr(torch, dtype)


def runs(loaded: Loaded) -> dict[str, tuple[int, ...]]:
    batch = example_batch(loaded)
    with torch.inference_mode():
        loaded.model(**batch)
    return {name: tuple(value.shape) for name, value in batch.items()}


def test_two_short_texts_are_the_example_of_a_tokenizer(bert):
    shapes = runs(load_model(bert))
    shapes.pop("token_type_ids", None)  # of transformers 4
    assert shapes == {"input_ids": (2, 3), "attention_mask": (2, 3)}


def test_a_tokenizer_without_padding_has_an_example_too(tmp_path):
    config = transformers.GPT2Config(vocab_size=12, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    loaded = load_model(save(transformers.GPT2Model(config), tmp_path, tokenizer()))
    assert loaded.prepare.pad_token is None
    assert runs(loaded)["input_ids"] == (2, 2)


def test_a_grey_image_is_the_example_of_an_image_processor(tmp_path):
    config = transformers.ViTConfig(image_size=32, patch_size=16, **SIZES)
    processor = getattr(transformers, VIT_IMAGE_PROCESSOR)(size={"height": 32, "width": 32})
    folder = save(transformers.ViTModel(config), tmp_path, processor)
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(folder, dtype=dtype)
        if any("requires the Torchvision library" in note for note in loaded.notes):
            pytest.skip("this transformers loads no image processor without torchvision")
        assert loaded.notes == ()
        batch = example_batch(loaded)
        assert batch["pixel_values"].dtype == loaded.model.dtype
        assert batch["pixel_values"].unique().numel() == 1
        assert runs(loaded) == {"pixel_values": (1, 3, 32, 32)}


def test_a_second_of_silence_is_the_example_of_a_feature_extractor(tmp_path):
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(4, 4), conv_stride=(20, 16), conv_kernel=(40, 16), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    loaded = load_model(save(transformers.Wav2Vec2Model(config), tmp_path, extractor))
    assert runs(loaded)["input_values"] == (1, 8000)
    assert not np.any(example_batch(loaded)["input_values"].numpy())


def test_a_decoder_gets_its_first_token(tmp_path):
    config = transformers.T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    loaded = load_model(save(transformers.T5Model(config), tmp_path, tokenizer(pad_token="[PAD]")))
    assert runs(loaded)["decoder_input_ids"] == (2, 1)


def test_only_what_the_model_takes_is_in_the_example():
    class Plain(nn.Module):
        def forward(self, input_ids):
            return input_ids

    prepare = tokenizer(pad_token="[PAD]")
    assert set(prepare(["A"])) >= {"input_ids", "attention_mask"}
    assert list(example_batch(Loaded(Plain(), prepare, "plain"))) == ["input_ids"]


def test_a_bare_model_has_the_example_that_it_proposes_or_none():
    bare = transformers.BertModel(bert_config())
    assert runs(Loaded(bare, None, "bare"))["input_ids"] == (3, 5)
    vision = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **SIZES))
    assert example_batch(Loaded(vision, None, "vision")) is None  # what it proposes is not what it takes
    assert example_batch(Loaded(nn.Linear(2, 2), list, "mine")) is None
