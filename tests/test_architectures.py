"""Real architectures, tiny and with random weights: blocks against the library's own hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from models import count_hooks
from releases import TRANSFORMERS
from torch import Tensor, nn

from activation_extractor import blocks, capture, gradients, inputs

WORDS, WIDTH, LAYERS = 50, 16, 3


@dataclass(frozen=True)
class Stream:
    """How one tuple of hidden states maps to the layers of a model.

    Attributes:
        key: the field of the model's output that holds the tuple.
        blocks: the names of the blocks that the tuple is about.
        norm: the layer that the last block's output goes through before it becomes the last entry, if any.
        has_embedding: whether the tuple begins with the first block's input rather than its output.
        fit: what the library does to a block's value before it joins the tuple.
    """

    key: str = "hidden_states"
    blocks: str = ""
    norm: str | None = None
    has_embedding: bool = True
    fit: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(frozen=True)
class Architecture:
    """A model to build: ``AutoModel.from_config(config())``, or the part of it that is named.

    Attributes:
        config: makes the configuration.
        batch: makes what the model is called with.
        streams: what its hidden states are.
        part: the module that is tested; "" for the model.
        since: the release of transformers since which it is so, or runs on a CPU.
    """

    config: Callable[[], Any]
    batch: Callable[[], dict[str, Tensor]]
    streams: tuple[Stream, ...] = (Stream(),)
    part: str = ""
    since: tuple[int, int] = (0, 0)

    def build(self) -> nn.Module:
        if self.since > TRANSFORMERS:
            pytest.skip(f"transformers {tf.__version__} does not have it, or not so")
        torch.manual_seed(0)
        return tf.AutoModel.from_config(self.config()).get_submodule(self.part).eval()


def token_ids(seq: int = 7) -> Tensor:
    return torch.randint(3, WORDS, (2, seq), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    return {"input_ids": token_ids()}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(4)}


def values(name: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def like_bert(config: str, **options: Any) -> Callable[[], Any]:
    """A configuration, by the name of its class, in the words that most of them share."""
    words = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
    return lambda: getattr(tf, config)(**{**words, "vocab_size": WORDS, **options})


def ends_in(norm: str) -> tuple[Stream, ...]:
    return (Stream(norm=norm),)


SPEECH = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,  # draws from numpy's generator
    "layerdrop": 0.0,  # layers that do not run are another test's matter
}
BART = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
IMAGE = {"image_size": 32, "patch_size": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGES = values("pixel_values", 2, 3, 32, 32)
SOUND = values("input_values", 2, 1600)

ARCHITECTURES = {
    # encoders
    "bert": Architecture(like_bert("BertConfig"), text),
    "roberta": Architecture(like_bert("RobertaConfig"), text),
    "electra": Architecture(like_bert("ElectraConfig", embedding_size=8), text),
    "deberta_v2": Architecture(like_bert("DebertaV2Config"), text),
    "distilbert": Architecture(
        lambda: tf.DistilBertConfig(vocab_size=WORDS, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=32), text
    ),
    "esm": Architecture(
        like_bert("EsmConfig", pad_token_id=1, mask_token_id=2), text, ends_in("encoder.emb_layer_norm_after")
    ),
    "modernbert": Architecture(
        like_bert("ModernBertConfig", cls_token_id=1, sep_token_id=2, **ENDS),
        text,
        ends_in("final_norm"),
        since=(5, 0),
    ),
    "xlnet": Architecture(
        lambda: tf.XLNetConfig(vocab_size=WORDS, d_model=WIDTH, n_layer=LAYERS, n_head=2, d_inner=32),
        text,
        (Stream(fit=lambda value: value.permute(1, 0, 2)),),  # computed as (seq, batch, features)
    ),
    # decoders
    "gpt2": Architecture(
        lambda: tf.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=2, **ENDS), text, ends_in("ln_f")
    ),
    "llama": Architecture(like_bert("LlamaConfig", num_key_value_heads=1), text, ends_in("norm")),
    "mistral": Architecture(like_bert("MistralConfig", num_key_value_heads=1), text, ends_in("norm")),
    "mixtral": Architecture(
        like_bert("MixtralConfig", num_key_value_heads=1, num_local_experts=2), text, ends_in("norm")
    ),
    "qwen3": Architecture(like_bert("Qwen3Config", num_key_value_heads=1, head_dim=8), text, ends_in("norm")),
    "gemma2": Architecture(like_bert("Gemma2Config", num_key_value_heads=1, head_dim=8), text, ends_in("norm")),
    "gpt_neox": Architecture(like_bert("GPTNeoXConfig"), text, ends_in("final_layer_norm")),
    "bloom": Architecture(
        lambda: tf.BloomConfig(vocab_size=WORDS, hidden_size=WIDTH, n_layer=LAYERS, n_head=2), text, ends_in("ln_f")
    ),
    # state-space and recurrent; Mamba's tuples begin with the first block's output
    "mamba": Architecture(like_bert("MambaConfig", state_size=4), text, (Stream(norm="norm_f", has_embedding=False),)),
    "mamba2": Architecture(
        like_bert("Mamba2Config", state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
        text,
        (Stream(norm="norm_f", has_embedding=False),),
    ),
    "rwkv": Architecture(
        like_bert("RwkvConfig", attention_hidden_size=WIDTH), text, (Stream(norm="ln_out", has_embedding=False),)
    ),
    "jamba": Architecture(  # attention and Mamba in turn
        like_bert(
            "JambaConfig",
            num_hidden_layers=4,
            num_key_value_heads=1,
            num_experts=2,
            mamba_d_state=4,
            attn_layer_period=2,
            attn_layer_offset=1,
        ),
        text,
        ends_in("final_layernorm"),
        since=(5, 0),
    ),
    # encoder and decoder
    "t5": Architecture(
        lambda: tf.T5Config(vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        two_texts,
        (
            Stream("encoder_hidden_states", "encoder.", "encoder.final_layer_norm"),
            Stream("decoder_hidden_states", "decoder.", "decoder.final_layer_norm"),
        ),
    ),
    "bart": Architecture(
        lambda: tf.BartConfig(**BART),
        two_texts,
        (Stream("encoder_hidden_states", "encoder."), Stream("decoder_hidden_states", "decoder.")),
    ),
    # vision
    "vit": Architecture(like_bert("ViTConfig", **IMAGE), IMAGES),
    "beit": Architecture(like_bert("BeitConfig", **IMAGE), IMAGES),
    "dinov2": Architecture(like_bert("Dinov2Config", mlp_ratio=2, **IMAGE), IMAGES),
    "clip_vision": Architecture(like_bert("CLIPVisionConfig", **IMAGE), IMAGES),
    "swin": Architecture(
        lambda: tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4),
        IMAGES,
    ),
    "convnext": Architecture(lambda: tf.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]), IMAGES),
    "resnet": Architecture(
        lambda: tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16], depths=[1, 1, 2], layer_type="basic"), IMAGES
    ),
    # audio
    "wav2vec2": Architecture(like_bert("Wav2Vec2Config", **SPEECH), SOUND),
    "hubert": Architecture(like_bert("HubertConfig", **SPEECH), SOUND),
    "wavlm": Architecture(like_bert("WavLMConfig", **SPEECH), SOUND),
    "ast": Architecture(
        like_bert("ASTConfig", max_length=48, num_mel_bins=32), values("input_values", 2, 48, 32), since=(5, 0)
    ),
    "whisper_encoder": Architecture(
        lambda: tf.WhisperConfig(num_mel_bins=8, max_source_positions=20, **BART),
        values("input_features", 2, 8, 40),
        ends_in("layer_norm"),
        part="encoder",
    ),
}

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


@each_architecture
@torch.inference_mode()
def test_captured_blocks_equal_the_models_own_hidden_states(architecture: Architecture) -> None:
    model = architecture.build()
    names = {
        each.key: [name for name in blocks(model) if name.startswith(each.blocks)] for each in architecture.streams
    }
    wanted = blocks(model) + [stream.norm for stream in architecture.streams if stream.norm]
    with capture(model, [wanted, inputs(wanted)]) as acts:
        output = model(**architecture.batch(), output_hidden_states=True)
    assert set().union(*names.values()) == set(blocks(model))
    for stream in architecture.streams:
        expected = own_states(stream, names[stream.key], acts)
        assert len(expected) == len(output[stream.key])
        for index, (name, value) in enumerate(expected):
            assert torch.equal(stream.fit(value), output[stream.key][index]), (stream.key, index, name)


def own_states(stream: Stream, names: list[str], acts: Any) -> list[tuple[str, Tensor]]:
    """What a tuple of hidden states should be, by recorded name, from what was captured."""
    recorded = [f"{names[0]}:input"] if stream.has_embedding else []
    recorded += names
    if stream.norm and stream.has_embedding:
        recorded[-1] = stream.norm  # in the place of the last block's output, which is what it is given
    elif stream.norm:
        recorded.append(stream.norm)
    if stream.norm:
        assert torch.equal(acts[f"{stream.norm}:input"], acts[names[-1]])
    return [(name, acts[name]) for name in recorded]


@each_architecture
def test_training_with_everything_captured_computes_the_same_bits(architecture: Architecture) -> None:
    model, batch = architecture.build().train(), architecture.batch()
    expected = train_step(model, batch)
    before = state_of(model)
    everything = ["**", inputs(blocks(model)), gradients(blocks(model))]
    with capture(model, everything, calls="all", missing="skip"), capture(model, blocks(model)):
        assert torch.is_grad_enabled()
        got = train_step(model, batch)
    assert state_of(model) == before
    assert len(got) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def train_step(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Everything that a forward returns, dropout included, and all gradients of a backward."""
    torch.manual_seed(2)
    model.zero_grad()
    output = model(**batch, output_hidden_states=True)
    returned = list(tensors(output.values()))
    output.last_hidden_state.square().sum().backward()
    return returned + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(value)


def state_of(model: nn.Module) -> Any:
    """What a capture must leave as it was: hooks, flags, where parameters and buffers lie, and the grad mode."""
    places = {name: value.data_ptr() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return count_hooks(model), flags, places, wanted, attributes, modes


def test_layers_that_share_weights_are_told_apart_by_their_calls() -> None:
    config = like_bert("AlbertConfig", embedding_size=8)()
    torch.manual_seed(0)
    model = tf.AlbertModel(config).eval()
    with torch.no_grad(), capture(model, "encoder.albert_layer_groups.0", calls="all") as acts:
        output = model(**text(), output_hidden_states=True)
    calls = acts["encoder.albert_layer_groups.0"]
    assert len(calls) == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(calls, output.hidden_states[1:], strict=True))


@pytest.mark.skipif(TRANSFORMERS < (5, 0), reason="this transformers attaches none")
def test_hooks_that_transformers_attaches_inside_the_block_are_left_alone() -> None:
    captured, twin = (ARCHITECTURES["bert"].build() for _ in range(2))
    with capture(captured, blocks(captured)):
        inside = captured(**text(), output_hidden_states=True)
    outside = twin(**text(), output_hidden_states=True)
    assert count_hooks(captured) == count_hooks(twin) > 0
    again = captured(**text(), output_hidden_states=True)
    for one, other, third in zip(inside.hidden_states, outside.hidden_states, again.hidden_states, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
