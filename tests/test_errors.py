"""The tree of errors and what their texts look like."""

from __future__ import annotations

import builtins
import pickle
import re
import sys
import traceback

import pytest
import torch

import activation_extractor
from activation_extractor import errors
from activation_extractor.errors import ActivationError, examples, shown

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}
LINE = re.compile(r"^ *(?P<bars>│?) *(?:├── |└── )(?P<name>\w+) +(?P<builtin>\w+) +(?P<when>\S.+)$", re.MULTILINE)
TREE = {match["name"]: match for match in LINE.finditer(errors.__doc__)}

EXAMPLES = {
    "ArgumentError": errors.ArgumentError("calls", "be one of 'last', 'all', 'join'", "first", "Choose one."),
    "ArgumentTypeError": errors.ArgumentTypeError("copy", "be True or False", 1, "Write True."),
    "LayerNotFoundError": errors.LayerNotFoundError("h.9", ["h.0", "h.1"]),
    "DuplicateLayerError": errors.DuplicateLayerError("h.0", "twice", "Leave one of them out."),
    "UnhookableLayerError": errors.UnhookableLayerError("h", "a ModuleList", "Select what is in it: 'h.*'."),
    "UntappedLayerError": errors.UntappedLayerError(["h.0", "head"]),
    "LayerNotRunError": errors.LayerNotRunError(["a", "b", "c", "d", "e"], {"b": "was skipped"}),
    "GradientNotFoundError": errors.GradientNotFoundError(["h.0:gradient"]),
    "ValueNotFoundError": errors.ValueNotFoundError("h.0", {"a": 3}, select="b"),
    "TensorKindError": errors.TensorKindError("a sparse tensor", "Convert it.", "h.0", "in a file"),
    "PartError": errors.PartError("h.0", "part 1 of 2 along axis 1"),
    "OverwrittenError": errors.OverwrittenError("h.0"),
    "TransformedCallError": errors.TransformedCallError("h.0"),
    "InferenceReferenceError": errors.InferenceReferenceError(),
    "MaskError": errors.MaskError("have shape (2, 3)", "shape (2, 4)", "Pass mask=None.", "h.0"),
    "SequenceAxisError": errors.SequenceAxisError("h.0", torch.Size([2, 3]), "have three axes", "Pass sequence_axis=."),
    "PositionError": errors.PositionError(-3, 1, 2),
    "PoolingError": errors.PoolingError("A span", "lie in its row", "3 to 9 of 5", 2, "Cut it."),
    "ReducerError": errors.ReducerError("mine", "h.0", "a float"),
    "CombinationError": errors.CombinationError("last", "have one dtype", "float32 of 'h.0' and float16 of 'h.1'"),
    "StoredDtypeError": errors.StoredDtypeError("h.0", "mean", "row 3, id 'P1'", 7e4, "float16", 65504.0),
    "CapacityError": errors.CapacityError(100, 120, "h.0"),
    "StepError": errors.StepError(
        "begin inside the with-block", "one after it was left", "Begin it in the with-block."
    ),
    "MatchError": errors.MatchError("be the same rows", "'z', which right lacks", "Compare stores of one data set."),
    "StopEarlyError": errors.StopEarlyError(),
    "ActivationNotFoundError": errors.ActivationNotFoundError("h.9", "A key must be one of 'h.0', got 'h.9'. Ask."),
    "StoreError": errors.StoreError("out/", "be a store", "an empty folder", "Give another one."),
    "OtherRunError": errors.OtherRunError("out/", ["weights", "calls", "mask", "reducers"]),
    "UnsupportedTorchError": errors.UnsupportedTorchError("torch._C._new_name", "9.9.0"),
    "OtherProcessError": errors.OtherProcessError(0, "StoreError: The disk is full. Make room."),
    "MissingExtraError": errors.MissingExtraError("The command line", "cli", "typer"),
}


@pytest.mark.parametrize("python", [sys.version_info[:2], (3, 10)])
def test_notes_are_kept_in_the_order_in_which_they_came(monkeypatch, python):
    monkeypatch.setattr("activation_extractor.errors.sys.version_info", python)
    error = ValueError("x")
    errors.add_note(error, "one")
    errors.add_note(error, "two")
    assert error.__notes__ == ["one", "two"]
    assert "one\ntwo" in "".join(traceback.format_exception(error)) or sys.version_info < (3, 11)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_exported_and_derives_from_the_base(name):
    assert name in errors.__all__
    assert issubclass(CLASSES[name], ActivationError)


def test_exactly_the_errors_are_exported_and_in_the_tree():
    assert sorted(errors.__all__) == sorted(CLASSES) == sorted({*TREE, "ActivationError"})
    assert list(errors.__all__) == sorted(errors.__all__)
    assert activation_extractor.ActivationError is ActivationError


@pytest.mark.parametrize("name", TREE)
def test_an_error_derives_from_what_the_tree_says(name):
    error, line = CLASSES[name], TREE[name]
    parents = {"ArgumentTypeError": errors.ArgumentError, "OtherRunError": errors.StoreError}
    assert (name in parents) == bool(line["bars"])
    expected = (parents.get(name, ActivationError), getattr(builtins, line["builtin"]))
    assert error.__bases__ == expected or error.__bases__ == (errors.StoreError,)  # which is an OSError already
    assert isinstance(EXAMPLES[name], getattr(builtins, line["builtin"]))


@pytest.mark.parametrize("name", TREE)
def test_a_text_says_what_is_wrong_and_what_to_do(name):
    text = str(EXAMPLES[name])
    assert re.fullmatch(r"\S.+\. \S.+", text)
    assert len(re.findall(r"\.(?= [A-Z]|$)", text.rstrip("."))) <= 1  # two sentences


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("ArgumentError", {"argument": "calls", "value": "first"}),
        ("ArgumentTypeError", {"argument": "copy", "value": 1}),
        ("LayerNotFoundError", {"selection": "h.9", "close_matches": ("h.0", "h.1")}),
        ("DuplicateLayerError", {"name": "h.0"}),
        ("UnhookableLayerError", {"layer": "h"}),
        ("UntappedLayerError", {"layers": ("h.0", "head")}),
        ("LayerNotRunError", {"layers": ("a", "b", "c", "d", "e"), "reasons": {"b": "was skipped"}}),
        ("GradientNotFoundError", {"layers": ("h.0:gradient",)}),
        ("ValueNotFoundError", {"layer": "h.0", "value_type": "dict"}),
        ("TensorKindError", {"kind": "a sparse tensor", "advice": "Convert it.", "layer": "h.0"}),
        ("OverwrittenError", {"layer": "h.0"}),
        ("TransformedCallError", {"layer": "h.0"}),
        ("MaskError", {"layer": "h.0"}),
        ("SequenceAxisError", {"layer": "h.0", "shape": (2, 3)}),
        ("PositionError", {"row": 1}),
        ("ReducerError", {"reducer": "mine", "layer": "h.0"}),
        ("CapacityError", {"max_bytes": 100, "kept_bytes": 120, "layer": "h.0"}),
        ("ActivationNotFoundError", {"key": "h.9"}),
        ("StoreError", {"path": "out/"}),
        ("OtherRunError", {"differences": ("weights", "calls", "mask", "reducers")}),
        ("MissingExtraError", {"extra": "cli"}),
    ],
)
def test_an_error_keeps_what_it_is_about(name, attributes):
    assert {key: getattr(EXAMPLES[name], key) for key in attributes} == attributes
    documented = re.findall(r"^        (\w+): ", CLASSES[name].__doc__, re.MULTILINE)
    assert documented == [] or set(documented) == set(attributes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ArgumentError", "calls must be one of 'last', 'all', 'join', got 'first'. Choose one."),
        ("ArgumentTypeError", "copy must be True or False, got 1. Write True."),
        ("LayerNotFoundError", "No layer matches 'h.9'. Close matches: 'h.0', 'h.1'."),
        ("DuplicateLayerError", "A recorded name must stand for one thing, got 'h.0' twice. Leave one of them out."),
        ("MaskError", "The mask for layer 'h.0' must have shape (2, 3), got shape (2, 4). Pass mask=None."),
        (
            "TensorKindError",
            "The value of layer 'h.0' must hold plain numbers in a file, got a sparse tensor. Convert it.",
        ),
        ("StoreError", "'out/' must be a store, got an empty folder. Give another one."),
        (
            "MissingExtraError",
            "The command line needs typer, which is not installed. "
            "Install it with: pip install 'activation_extractor[cli]'",
        ),
        (
            "ValueNotFoundError",
            "Layer 'h.0' has no tensor to record at select='b', its value is of type dict. "
            "Choose the part to record with outputs(..., select=) or inputs(..., select=), or leave the layer out.",
        ),
    ],
)
def test_the_text_of(name, text):
    assert str(EXAMPLES[name]) == text


def test_a_missing_key_shows_its_text_and_not_the_repr_of_it():
    error = EXAMPLES["ActivationNotFoundError"]
    assert str(error) == "A key must be one of 'h.0', got 'h.9'. Ask."
    assert error.args == ("h.9",)


def test_advice_may_be_left_out():
    assert str(errors.ArgumentError("to", "be a device", "tpu9")) == "to must be a device, got 'tpu9'."


def test_without_a_layer_the_mask_itself_is_at_fault():
    error = errors.MaskError("be a tensor", "list", "Convert it.")
    assert str(error) == "The mask must be a tensor, got list. Convert it."
    assert error.layer is None


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "'a'"),
        (["a", "b", "c"], "'a', 'b', 'c'"),
        (("a", "b", "c", "d"), "'a', 'b', 'c' and 1 more"),
        (iter("abcdefg"), "'a', 'b', 'c' and 4 more"),
    ],
)
def test_three_examples_and_a_count_are_no_dump(names, text):
    assert examples(names) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("h.0", "'h.0'"),
        ("x" * 98, repr("x" * 98)),
        ("x" * 99, f"a str ('{'x' * 39} ...)"),
        (torch.zeros(2, 1), "a Tensor (tensor([[0.], [0.]]) ...)"),
        (list(range(100)), "a list ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1 ...)"),
    ],
)
def test_a_value_is_shown_as_typed_unless_it_is_data(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_survives_the_way_to_another_process(name):
    error = EXAMPLES[name]
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin)) == (type(error), str(error))
    assert twin.__dict__ == error.__dict__
