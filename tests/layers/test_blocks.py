"""Finding the repeated blocks of models that people use."""

from __future__ import annotations

import pytest
import transformers
from models import BatchNormNet, Block, BlockStack
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from activation_extractor import blocks, capture
from activation_extractor.errors import ArgumentError, ArgumentTypeError

TEXT = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def numbered(stack: str, count: int) -> list[str]:
    return [f"{stack}.{index}" for index in range(count)]


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT, **SMALL))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT, n_embd=8, n_layer=3, n_head=2, n_positions=16))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    return transformers.T5Model(config)


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 3], layer_type="basic")
    return transformers.ResNetModel(config)


def mixtral() -> nn.Module:
    return transformers.MixtralModel(
        transformers.MixtralConfig(**TEXT, **SMALL, num_key_value_heads=2, num_local_experts=4)
    )


def wav2vec2(hidden_size: int = 32) -> nn.Module:
    # By default the front holds a twentieth of the blocks' parameters, as in the base model.
    config = transformers.Wav2Vec2Config(
        **{**SMALL, "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size},
        conv_dim=(10, 10, 10, 10, 10, 10, 10),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2Model(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bert, numbered("encoder.layer", 3)),
        (gpt2, numbered("transformer.h", 3)),
        (t5, numbered("encoder.block", 2) + numbered("decoder.block", 3)),
        (mixtral, numbered("layers", 3)),
        (resnet, numbered("encoder.stages", 2)),
        (wav2vec2, numbered("encoder.layers", 3)),
        (BlockStack, numbered("h", 4)),
    ],
)
def test_the_blocks_are_the_repeated_stack(make, expected):
    assert blocks(make()) == expected


def test_the_blocks_of_an_image_transformer_are_its_layers():
    found = blocks(vit())  # the folder that they stand in differs between releases
    assert [name.rpartition(".")[2] for name in found] == ["0", "1", "2"]
    assert {type(vit().get_submodule(name)).__name__ for name in found} == {"ViTLayer"}


def test_the_front_of_an_audio_model_is_left_out_for_its_size_alone():
    model = wav2vec2()
    front = sum(p.numel() for p in model.feature_extractor.conv_layers.parameters())
    assert 0.03 < front / sum(p.numel() for p in model.encoder.layers.parameters()) < 0.07
    small = wav2vec2(hidden_size=8)
    assert blocks(small) == numbered("feature_extractor.conv_layers", 7) + numbered("encoder.layers", 3)


def test_the_blocks_of_a_plain_transformer_are_its_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert blocks(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)) == numbered("layers", 3)
    both = nn.Transformer(8, 2, 2, 3, 16, batch_first=True)
    assert blocks(both) == numbered("encoder.layers", 2) + numbered("decoder.layers", 3)


def test_blocks_are_a_selection_that_capture_takes(stack, tokens):
    with capture(stack, blocks(stack)) as acts:
        stack(tokens)
    assert list(acts) == numbered("h", 4)


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper])
def test_names_are_those_of_the_plain_model(stack, wrap):
    assert blocks(wrap(stack)) == numbered("h", 4)


def test_blocks_in_wrappers_are_found(stack):
    for index in range(4):
        stack.h[index] = checkpoint_wrapper(stack.h[index])
    assert blocks(stack) == numbered("h", 4)


def test_the_stages_of_a_residual_network_are_stacks_of_blocks():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    for stage in ("layer1", "layer2"):
        model.add_module(stage, nn.Sequential(Block(), Block()))
    model.add_module("norm", nn.BatchNorm2d(4))
    assert blocks(model) == numbered("layer1", 2) + numbered("layer2", 2)


def test_stacks_inside_blocks_do_not_count():
    nested = nn.Sequential(*(nn.Sequential(Block(), Block()) for _ in range(2)))
    assert blocks(nested) == ["0", "1"]


def test_stacks_under_one_parent_stay_together_however_small():
    model = nn.Module()
    model.small = nn.Sequential(Block(1), Block(1))
    model.big = nn.Sequential(Block(32), Block(32))
    assert blocks(model) == ["small.0", "small.1", "big.0", "big.1"]


@pytest.mark.parametrize(("features", "is_kept"), [(7, False), (12, True)])
def test_a_parent_with_less_than_a_tenth_of_the_parameters_is_left_out(features, is_kept):
    model = nn.Module()
    model.front = nn.Module()
    model.front.stages = nn.ModuleList([Block(features), Block(features)])
    model.main = nn.Module()
    model.main.stages = nn.ModuleList([Block(32), Block(32)])
    expected = numbered("main.stages", 2)
    assert blocks(model) == (numbered("front.stages", 2) + expected if is_kept else expected)


def test_a_stack_may_be_a_dict_and_have_a_few_of_another_type():
    model = nn.Module()
    model.cells = nn.ModuleDict({"in": nn.Sequential(nn.Linear(2, 2)), "a": Block(), "b": Block(), "c": Block()})
    assert blocks(model) == ["cells.in", "cells.a", "cells.b", "cells.c"]


def test_without_composite_blocks_plain_layers_count():
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "model",
    [
        BatchNormNet(),
        nn.Linear(2, 2),
        nn.Sequential(Block()),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(),
    ],
)
def test_a_model_in_which_nothing_repeats_is_an_error(model):
    with pytest.raises(ArgumentError) as caught:
        blocks(model)
    kind = type(model).__name__
    assert str(caught.value) == (
        f"model must hold a stack of repeated blocks, got {kind!r}. Name the layers, or select them by type."
    )


def test_what_is_no_model_is_an_error():
    with pytest.raises(ArgumentTypeError, match=r"^model must be a torch\.nn\.Module .+, got 'bert'\."):
        blocks("bert")


def test_an_empty_place_in_a_stack_is_no_block(stack):
    stack.h[1] = None  # as pipeline parallelism leaves out what is elsewhere
    assert blocks(stack) == ["h.0", "h.2", "h.3"]


@pytest.mark.parametrize(
    ("plain", "wrapped"),
    [
        ([Block(), Block()], [checkpoint_wrapper(Block()), Block()]),
        ([nn.Linear(2, 2), nn.ReLU()], [checkpoint_wrapper(nn.Linear(2, 2)), checkpoint_wrapper(nn.ReLU())]),
    ],
)
def test_wrapping_children_changes_nothing(plain, wrapped):
    assert blocks_or_none(nn.Sequential(*wrapped)) == blocks_or_none(nn.Sequential(*plain))


def blocks_or_none(model: nn.Module) -> list[str] | None:
    try:
        return blocks(model)
    except ArgumentError:
        return None
