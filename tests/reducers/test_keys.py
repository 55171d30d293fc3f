"""How activations and stores are indexed."""

from __future__ import annotations

import pytest

from activation_extractor.errors import ActivationNotFoundError
from activation_extractor.reducers._keys import entry_keys, resolve_key

NAMES = ["h.0", "h.1", "h.1:input"]


@pytest.mark.parametrize(
    ("key", "reducers", "expected"),
    [
        ("h.0", ["mean"], ("h.0", "mean")),
        (("h.0", "mean"), ["mean"], ("h.0", "mean")),
        (("h.1:input", "last"), ["mean", "last"], ("h.1:input", "last")),
        (("h.0", "LT"), ["mean", "last"], ("h.0", "last")),
        (("h.0", "FT"), ["FT", "first"], ("h.0", "FT")),  # a name of the user's own
    ],
)
def test_a_key_is_a_layer_and_a_reducer_or_a_layer_alone(key, reducers, expected):
    assert resolve_key(key, NAMES, reducers) == expected


def test_iteration_gives_names_or_pairs_and_each_of_them_is_a_key():
    assert entry_keys(NAMES, ["mean"]) == NAMES
    pairs = entry_keys(NAMES[:2], ["mean", "last"])
    assert pairs == [("h.0", "mean"), ("h.0", "last"), ("h.1", "mean"), ("h.1", "last")]
    assert [resolve_key(pair, NAMES, ["mean", "last"]) for pair in pairs] == pairs


@pytest.mark.parametrize(
    ("key", "names", "reducers", "text"),
    [
        ("h.2", NAMES, ["mean"], "Nothing is recorded under 'h.2'. Close matches: 'h.1', 'h.0'."),
        ("zzz", NAMES, ["mean"], "Nothing is recorded under 'zzz'. There is 'h.0', 'h.1', 'h.1:input'."),
        (3, NAMES, ["mean"], "Nothing is recorded under 3. There is 'h.0', 'h.1', 'h.1:input'."),
        (("zzz", "mean"), NAMES, ["mean"], "Nothing is recorded under 'zzz'. There is 'h.0', 'h.1', 'h.1:input'."),
        ("h.0", [], ["mean"], "Nothing is recorded under 'h.0'. Nothing has been recorded yet, or it was cleared."),
        (
            "h.0",
            NAMES,
            ["mean", "last"],
            "A key must say which reducer is meant ('mean', 'last'), got 'h.0'. Write ['h.0', 'mean'].",
        ),
        (
            ("h.0", "max"),
            NAMES,
            ["mean", "last"],
            "A reducer in a key must be one of 'mean', 'last', got 'max'. Ask for it with reduce=.",
        ),
        (
            ("h.0", "FT"),
            NAMES,
            ["mean"],
            "A reducer in a key must be one of 'mean', got 'first'. Ask for it with reduce=.",
        ),
    ],
)
def test_a_key_that_is_not_there_says_what_is(key, names, reducers, text):
    with pytest.raises(ActivationNotFoundError) as caught:
        resolve_key(key, names, reducers)
    assert str(caught.value) == text
    assert caught.value.key == key


@pytest.mark.parametrize("key", [("h.0", "mean", "last"), None, ["h.0"]])
def test_a_key_of_another_form_is_not_there(key):
    with pytest.raises(KeyError):
        resolve_key(key, NAMES, ["mean"])
