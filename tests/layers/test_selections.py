"""Selections and what they resolve to."""

from __future__ import annotations

import re

import pytest
import torch
from models import Block
from torch import nn

from activation_extractor import blocks, capture, gradients, inputs, outputs
from activation_extractor.errors import ArgumentError, ArgumentTypeError, DuplicateLayerError, LayerNotFoundError
from activation_extractor.layers._selections import resolve

BLOCKS = ["h.0", "h.1", "h.2", "h.3"]
TYPES = "be a name, pattern, regex, module, module type, predicate, or an iterable or dict of these"


def names(model: nn.Module, layers: object) -> list[str]:
    return [target.name for target in resolve(model, layers)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("h.0", ["h.0"]),
        ("", [""]),
        ("h.*", BLOCKS),
        ("h.?", BLOCKS),
        ("h.[0-1]", BLOCKS[:2]),
        ("h.[!0-1]", BLOCKS[2:]),
        ("h.*.mlp", [f"{block}.mlp" for block in BLOCKS]),
        ("**.mlp", [f"{block}.mlp" for block in BLOCKS]),
        ("*", ["embed"]),
        ("h.0.**", ["h.0.norm", "h.0.mlp"]),
        ("h.**.norm", [f"{block}.norm" for block in BLOCKS]),
        (re.compile(r"h\.\d"), BLOCKS),
        (nn.LayerNorm, [f"{block}.norm" for block in BLOCKS]),
        (lambda name, module: isinstance(module, Block) and name > "h.1", BLOCKS[2:]),
        (["h.3", "h.0"], ["h.3", "h.0"]),
        ({"h.2"}, ["h.2"]),
        (["h.3", ["embed", "h.0"]], ["h.3", "embed", "h.0"]),
        ({"early": "h.0", "late": "h.3"}, ["early", "late"]),
        (inputs("h.0"), ["h.0:input"]),
        (gradients("h.0"), ["h.0:gradient"]),
        (outputs("h.0"), ["h.0"]),
        ([outputs("h.0"), inputs("h.0"), gradients("h.0")], ["h.0", "h.0:input", "h.0:gradient"]),
        ({"early": inputs("h.0")}, ["early"]),
        (inputs({"early": "h.0"}), ["early:input"]),
        (inputs(outputs("h.0")), ["h.0"]),
        (inputs(["h.0", gradients("h.1")]), ["h.0:input", "h.1:gradient"]),
    ],
)
def test_a_selection_names_what_will_be_recorded(stack, layers, expected):
    assert names(stack, layers) == expected


def test_a_double_star_takes_all_but_the_root_and_what_has_no_forward(stack):
    expected = [name for name, module in stack.named_modules() if name not in ("", "h")]
    assert names(stack, "**") == expected
    assert names(stack, nn.Module) == names(stack, lambda name, module: True) == expected


def test_a_module_object_selects_itself(stack):
    assert names(stack, stack.h[2]) == ["h.2"]
    assert names(stack, [stack.h[2], stack.embed, stack]) == ["h.2", "embed", ""]


def test_a_container_that_iterates_is_a_module_and_not_a_list_of_layers():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert names(model, model[0]) == ["0"]


def test_any_iterable_selects_also_one_that_runs_out(stack):
    assert names(stack, (name for name in BLOCKS)) == BLOCKS


def test_patterns_give_the_order_of_the_model_and_names_their_own(stack):
    assert names(stack, "h.[31]") == ["h.1", "h.3"]
    assert names(stack, ["h.3", "h.*"]) == ["h.3", "h.0", "h.1", "h.2"]


def test_overlapping_patterns_unite(stack):
    assert names(stack, ["h.*", "**", Block]) == [*BLOCKS, *(name for name in names(stack, "**") if name not in BLOCKS)]


def test_a_name_is_taken_literally_before_it_is_a_pattern():
    model = nn.Module()
    for name in ("a*", "ab"):
        model.add_module(name, nn.Linear(2, 2))
    assert names(model, "a*") == ["a*"]


def test_a_target_says_module_side_and_part(stack):
    def pick(value):
        return value

    (target,) = resolve(stack, {"mine": inputs("h.1", select=pick)})
    assert (target.name, target.layer, target.module) == ("mine", "h.1", stack.h[1])
    assert (target.side, target.select) == ("input", pick)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_mistyped_layer_names_close_matches(stack):
    with pytest.raises(LayerNotFoundError) as caught:
        resolve(stack, "h.1.mpl")
    assert str(caught.value).startswith("No layer matches 'h.1.mpl'. Close matches: 'h.1.mlp'")
    assert caught.value.selection == "h.1.mpl"
    assert names(stack, caught.value.close_matches[0]) == ["h.1.mlp"]


def test_a_mistyped_pattern_names_close_matches(stack):
    with pytest.raises(LayerNotFoundError, match=r"No layer matches 'h\.\*\.mpl'\. Close matches: 'h\.\d\.mlp'"):
        resolve(stack, "h.*.mpl")


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        ("zzzzzzzzz", "'zzzzzzzzz'"),
        (nn.Conv3d, "'Conv3d'"),
        (re.compile("zzzzz"), "re.compile('zzzzz')"),
    ],
)
def test_without_close_matches_the_error_says_how_to_list_the_layers(stack, layers, shown):
    with pytest.raises(LayerNotFoundError) as caught:
        resolve(stack, layers)
    advice = "[name for name, _ in model.named_modules()]"
    assert str(caught.value) == f"No layer matches {shown}. `{advice}` lists what there is."
    assert set(BLOCKS) < set(eval(advice, {"model": stack}))


def test_a_regex_has_to_match_the_whole_name(stack):
    with pytest.raises(LayerNotFoundError):
        resolve(stack, re.compile("h"))


def test_a_module_of_another_model_is_an_error(stack):
    with pytest.raises(LayerNotFoundError) as caught:
        resolve(stack, Block())
    assert str(caught.value) == "No layer matches 'Block'. This module is not part of the model."


@pytest.mark.parametrize("again", ["h.0", ["h.0"], "module"])
def test_a_layer_named_twice_is_an_error(stack, again):
    again = stack.h[0] if again == "module" else again
    with pytest.raises(DuplicateLayerError) as caught:
        resolve(stack, ["h.0", again])
    assert str(caught.value) == ("A recorded name must stand for one thing, got 'h.0' twice. Leave one of them out.")
    assert caught.value.name == "h.0"


def test_one_new_name_for_two_layers_is_an_error_and_another_name_helps(stack):
    with pytest.raises(DuplicateLayerError) as caught:
        resolve(stack, [{"mine": "h.0"}, {"mine": "h.1"}])
    assert str(caught.value) == (
        "A recorded name must stand for one thing, got 'mine' for two things, of layers 'h.0' and 'h.1'. "
        "Give one of them another name: {'new name': selection}."
    )
    assert names(stack, [{"mine": "h.0"}, {"other": "h.1"}]) == ["mine", "other"]


def test_two_parts_of_one_output_need_two_names(stack):
    with pytest.raises(DuplicateLayerError, match="of layers 'h.0' and 'h.0'"):
        resolve(stack, [outputs("h.0", select=0), outputs("h.0", select=1)])
    named = {"left": outputs("h.0", select=0), "right": outputs("h.0", select=1)}
    assert names(stack, named) == ["left", "right"]


def test_a_new_name_for_several_layers_is_an_error(stack):
    with pytest.raises(DuplicateLayerError) as caught:
        resolve(stack, {"mine": "h.*"})
    assert str(caught.value) == (
        "A recorded name must stand for one thing, got 'mine' for 4 layers selected by 'h.*'. "
        "Give each layer a name of its own."
    )


def test_an_error_about_a_new_name_dumps_no_module(stack):
    with pytest.raises(DuplicateLayerError) as caught:
        resolve(stack, {"mine": [stack.h[0], stack.h[1]]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [[], {}, (), iter([]), [[], {}]])
def test_an_empty_selection_is_an_error_and_its_advice_works(stack, layers):
    with pytest.raises(ArgumentError, match=r"^layers must select at least one layer, got .+\.") as caught:
        resolve(stack, layers)
    assert str(caught.value).endswith(". Try blocks(model) or '**'.")
    assert names(stack, blocks(stack)) == BLOCKS
    assert names(stack, "**")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (7, f"layers must {TYPES}, got 7."),
        (None, f"layers must {TYPES}, got None."),
        (b"h.0", f"layers must {TYPES}, got b'h.0'."),
        (["h.0", 1.5], f"layers must {TYPES}, got 1.5."),
        (int, "a type in layers must be a subclass of torch.nn.Module, got <class 'int'>."),
        ({3: "h.0"}, "a new name in layers must be a string, got 3."),
    ],
)
def test_a_selection_of_another_type_is_an_error(stack, layers, text):
    with pytest.raises(ArgumentTypeError) as caught:
        resolve(stack, layers)
    assert str(caught.value) == text


@pytest.mark.parametrize("side", [outputs, inputs, gradients])
def test_a_part_is_an_index_a_key_or_a_callable(side):
    with pytest.raises(ArgumentTypeError) as caught:
        side("h.0", select=1.5)
    assert str(caught.value) == "select must be an index, a key or a callable, got 1.5."
    assert side("h.0", select=len).select is len


# -- which side of the call, which part of the value ------------------------------------------------------------------


class Pairs(nn.Module):
    """Takes keyword arguments and returns a dict of a tuple."""

    def forward(self, left, *, right=None):
        return {"none": None, "pair": (left + 1, left * right)}


class Calls(nn.Module):
    """Calls a layer with a positional and a keyword argument."""

    def __init__(self):
        super().__init__()
        self.pairs = Pairs()

    def forward(self, x):
        return self.pairs(x, right=x + 2)["pair"][1].sum()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (outputs("pairs"), lambda x: x + 1),
        (outputs("pairs", select="pair"), lambda x: x + 1),
        (outputs("pairs", select=1), lambda x: x + 1),
        (outputs("pairs", select=lambda value: value["pair"][1]), lambda x: x * (x + 2)),
        (inputs("pairs"), lambda x: x),
        (inputs("pairs", select=0), lambda x: x),
        (inputs("pairs", select=1), lambda x: x + 2),
        (inputs("pairs", select="right"), lambda x: x + 2),
        (inputs("pairs", select=lambda given: given["left"] - given["right"]), lambda x: torch.full_like(x, -2)),
        (gradients("pairs", select=lambda value: value["pair"][1]), torch.ones_like),
    ],
)
def test_a_side_and_a_part_are_what_is_recorded(layers, expected):
    model, x = Calls(), torch.tensor([1.0, 5.0], requires_grad=True)
    with capture(model, {"part": layers}) as acts:
        model(x).backward()
    assert torch.equal(acts["part"], expected(x.detach()))
