"""What reading costs does not grow faster than the number of layers; and what a failed forward leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from activation_extractor import capture
from activation_extractor.activations._recorded_values import Recorded
from activation_extractor.errors import ActivationNotFoundError

READERS = {
    "dict": dict,
    "numpy": lambda acts: acts.numpy(),
    "repr": repr,
    "html": lambda acts: acts._repr_html_(),
    "items": lambda acts: list(acts.items()),
    "pairs": lambda acts: acts.pairs,
    "in": lambda acts: [
        key in acts for key in [*acts.pairs, "nowhere", ("0", "max"), ["0"], ("0", ["mean"]), 3, ("0",)]
    ],
    "one": lambda acts: acts[acts.pairs[-1]],
}


@pytest.mark.parametrize("reduce", ["mean", ["first", "last"]])
def test_a_key_is_in_the_mapping_if_it_can_be_read(reduce):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with capture(model, "0", reduce=reduce) as acts:
        model(torch.ones(1, 2, 3))
    others = [("0", "LT"), ("0", "max"), ("0", None), ("0",), ("0", "mean", "x"), 3, None, ["0"]]
    for key in ["0", "1", *acts.pairs, *others]:
        try:
            acts[key]
            assert key in acts
        except ActivationNotFoundError:
            assert key not in acts


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("options", [{}, {"reduce": ["mean", "last"]}, {"calls": "all"}, {"calls": "join"}], ids=str)
def test_names_are_listed_a_fixed_number_of_times_however_many_layers_are_read(read, options, monkeypatch):
    model = nn.Sequential(*(nn.Identity() for _ in range(50)))
    with capture(model, "*", **options) as acts:
        model(torch.ones(1, 2, 3))
    listed, names = [], Recorded.names.fget
    monkeypatch.setattr(Recorded, "names", property(lambda recorded: listed.append(1) or names(recorded)))
    read(acts)
    assert len(listed) <= 3


def test_a_file_of_many_layers_lists_their_names_once(monkeypatch, tmp_path):
    READERS["save"] = lambda acts: acts.save(tmp_path / "acts.npz")
    test_names_are_listed_a_fixed_number_of_times_however_many_layers_are_read(READERS.pop("save"), {}, monkeypatch)


# -- a forward that failed --------------------------------------------------------------------------------------------


def fails(activation, mask):
    raise KeyError("no such thing")


def after_a_failed_reducer(**options):
    model, error = nn.Sequential(nn.Identity(), nn.Identity()), None
    with capture(model, "*", **options) as acts:
        try:
            model(torch.ones(1, 2, 3))
        except KeyError as raised:
            error = raised
    return acts, error


@pytest.mark.parametrize("calls", ["last", "all"])
def test_of_a_reducer_that_failed_there_are_no_entries_and_the_others_are_there(calls):
    acts, error = after_a_failed_reducer(reduce=["mean", fails], calls=calls, missing="skip")
    assert error is not None
    assert list(acts) == acts.pairs == [("0", "mean")]
    assert len(acts) == len(dict(acts)) == 1
    assert "mean" in repr(acts)
    assert "mean" in acts._repr_html_()
    assert acts.numpy().keys() == {("0", "mean")}
    with pytest.raises(ActivationNotFoundError) as caught:
        acts["0", "fails"]
    assert str(caught.value) == (
        "Nothing is recorded under ('0', 'fails'): the forward failed before reducer 'fails' gave a value."
    )


def test_a_joined_value_that_cannot_be_reduced_is_shown_as_its_error():
    acts, error = after_a_failed_reducer(reduce=["mean", fails], calls="join")
    assert error is None
    with pytest.raises(KeyError, match="no such thing"):
        acts["0", "fails"]
    assert [line.split() for line in repr(acts).splitlines()[2:4]] == [
        ["0", "mean", "(1,", "3)", "float32", "cpu"],
        ["0", "fails", "KeyError"],
    ]
