"""What a run's values depend on: described equally where they are equal, and otherwise where they are not."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activation_extractor._format import _fingerprints
from activation_extractor._format._fingerprints import describe, differences
from activation_extractor.reducers import mean, position

PLAIN = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def made(source: str, name: str = "f") -> Any:
    """What the source of a module defines under a name."""
    namespace: dict[str, Any] = {"__name__": "users"}
    exec(source, namespace)
    return namespace[name]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x, m): return x + 1", "def f(x, m): return x * 1"),
        ("def f(x, m): return x + 1", "def f(x, m): return x + 2"),
        ("def f(x, m): return x + 1", "def f(x, m): return x + 1.0"),
        ("def f(x, m): return x['a']", "def f(x, m): return x['b']"),
        ("def f(x, m): return x.mean(1)", "def f(x, m): return x.sum(1)"),
        ("def f(x, m, k=1): return x + k", "def f(x, m, k=2): return x + k"),
        ("def f(x, m, *, k=1): return x + k", "def f(x, m, *, k=2): return x + k"),
        ("def f(x, m): return (lambda y: y + 1)(x)", "def f(x, m): return (lambda y: y + 2)(x)"),
        ("def f(x, m): return sum(y['a'] for y in x)", "def f(x, m): return sum(y['b'] for y in x)"),
        ("def f(x, m): return x in {'a', 'b'}", "def f(x, m): return x in {'a', 'c'}"),
        ("def f(x, m): return x + K\nK = 1", "def f(x, m): return x + K\nK = 2"),
        ("def f(x, m): return x[K]\nK = 'a'", "def f(x, m): return x[K]\nK = 'b'"),
        ("f = lambda x, m: [y + K for y in x]\nK = 0.5", "f = lambda x, m: [y + K for y in x]\nK = 0.25"),
        (
            "import torch\nK = torch.tensor([1, 2])\ndef f(x, m): return x + K",
            "import torch\nK = torch.tensor([1, 3])\ndef f(x, m): return x + K",
        ),
        ("def g(x): return x + 1\ndef f(x, m): return g(x)", "def g(x): return x + 2\ndef f(x, m): return g(x)"),
        (
            "def h(x): return x + 1\ndef g(x): return h(x)\ndef f(x, m): return (lambda: g(x))()",
            "def h(x): return x + 2\ndef g(x): return h(x)\ndef f(x, m): return (lambda: g(x))()",
        ),
    ],
)
def test_functions_that_compute_otherwise_differ(one, other):
    assert describe(made(one)) == describe(made(one))
    assert describe(made(one)) != describe(made(other))


@pytest.mark.parametrize(
    "other",
    [
        '\n\n\ndef f(x, m):\n    """First."""\n    return [y + 1 for y in x]',
        'def f(x, m):\n    """First."""\n    # why\n\n    return [y + 1 for y in x]',
        'def f(x, m):\n    """Second."""\n    return [y + 1 for y in x]',
        'def f(x, m):\n    """First."""\n    return [y + 1 for y in x]\nunrelated = 3',
    ],
    ids=["lines", "comment", "docstring", "neighbour"],
)
def test_functions_that_are_only_written_otherwise_are_equal(other):
    assert describe(made('def f(x, m):\n    """First."""\n    return [y + 1 for y in x]')) == describe(made(other))


def test_closures_count():
    make = made("def make(k):\n    def f(x, m): return x * k\n    return f", "make")
    assert describe(make(1)) == describe(make(1))
    assert describe(make(1)) != describe(make(2))
    assert describe(make(torch.tensor([1.0]))) == describe(make(torch.tensor([1.0])))
    assert describe(make(torch.tensor([1.0]))) != describe(make(torch.tensor([2.0])))
    assert describe(make(make(1))) != describe(make(make(2)))


def test_a_closure_without_a_value_yet_is_described():
    early = made("def make():\n    def f(x, m): return x * k\n    yield f\n    k = 1", "make")
    assert describe(next(early())) == describe(next(early()))


def test_functions_of_this_library_count_by_their_names():
    assert describe(mean) == "mean"
    assert describe(position(1)) == describe(position(1))
    assert describe(position(1)) != describe(position(2))
    assert describe([torch.relu, nn.GELU]) != describe([torch.relu, nn.ReLU])


def test_arguments_of_a_partial_count():
    of = functools.partial
    assert describe(of(torch.mean, dim=1)) == describe(of(torch.mean, dim=1))
    others = [of(torch.mean, dim=2), of(torch.sum, dim=1), of(torch.mean, 1), of(torch.mean, torch.ones(1), dim=1)]
    assert all(describe(of(torch.mean, dim=1)) != describe(other) for other in others)


SCALER = """
class Scaler:
    def __init__(self, factor): self.factor = factor
    def __call__(self, x, m): return x * self.factor
    def method(self, x, m): return x * self.factor
    @classmethod
    def of_class(cls, x, m): return x
"""


def test_the_state_of_an_object_counts_and_so_does_its_code():
    kind = made(SCALER, "Scaler")
    assert describe(kind(1)) == describe(kind(1))
    assert describe(kind(1)) != describe(kind(2))
    assert describe(kind(torch.ones(2))) != describe(kind(torch.zeros(2)))
    assert describe(kind(1)) != describe(made(SCALER.replace("m): return x *", "m): return x +"), "Scaler")(1))
    assert describe(kind(1)) != describe(made(SCALER.replace("Scaler", "Other"), "Other")(1))


def test_the_object_of_a_bound_method_counts():
    kind = made(SCALER, "Scaler")
    assert describe(kind(1).method) == describe(kind(1).method)
    assert describe(kind(1).method) != describe(kind(2).method)
    assert describe(kind(1).method) != describe(kind(1).of_class)


def test_attributes_in_slots_count():
    kind = made("class Slotted:\n    __slots__ = ('k',)\n    def __init__(self, k): self.k = k", "Slotted")
    assert describe(kind(1)) == describe(kind(1))
    assert describe(kind(1)) != describe(kind(2))


def test_addresses_in_a_repr_do_not_matter():
    class Bare:
        __slots__ = ()

    kind = made(SCALER, "Scaler")
    kept = [Bare(), Bare()]
    assert repr(kept[0]) != repr(kept[1])
    assert describe(kind(kept[0])) == describe(kind(kept[1]))


class Scale(nn.Module):
    def __init__(self, factor: object = 1.0) -> None:
        super().__init__()
        self.factor, self.weight = factor, nn.Parameter(torch.ones(3))

    def forward(self, x, m):
        return x.mean(1) * self.weight * self.factor


def test_a_module_as_a_reducer_counts_by_its_weights_and_settings():
    other = Scale()
    with torch.no_grad():
        other.weight[1] = 2
    assert describe(Scale()) == describe(Scale())
    assert describe(Scale()) != describe(other)
    assert describe(nn.Dropout(0.1)) != describe(nn.Dropout(0.2))


@pytest.mark.parametrize(("one", "other"), [(1.0, 2.0), ("mean", "max"), ((1, 2), (1, 3)), (None, 1)])
def test_a_plain_attribute_of_a_module_counts(one, other):
    assert describe(Scale(one)) != describe(Scale(other))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_values_dtypes_and_shapes_of_tensors_and_arrays_count(kind):
    assert describe(kind([[1, 2]])) == describe(kind([[1, 2]]))
    others = [kind([[1, 3]]), kind([[1.0, 2.0]]), kind([1, 2]), kind([[1], [2]])]
    assert len({json.dumps(describe(other)) for other in (*others, kind([[1, 2]]))}) == 5


def test_arrays_of_objects_count_by_what_they_hold():
    words = [np.array(["".join(["a", end]), "c"], dtype=object) for end in "bbz"]
    assert describe(words[0]) == describe(words[1])
    assert describe(words[0]) != describe(words[2])


def test_objects_that_hold_themselves_are_described_once():
    kind = made(SCALER, "Scaler")
    alone, ring = kind(None), [1]
    alone.factor = alone
    ring.append(ring)
    there = made("def f(x, m): return f(g(x), m)\ndef g(x): return f(x, None)")
    for value in (alone, ring, there, alone.method):
        assert describe(value) == json.loads(json.dumps(describe(value)))


def test_a_value_however_deep_is_described():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert json.dumps(describe(deep))


def test_objects_that_all_know_each_other_do_not_multiply(monkeypatch):
    calls, plain = [], _fingerprints._Describer.describe
    monkeypatch.setattr(_fingerprints._Describer, "describe", lambda self, value: calls.append(1) or plain(self, value))
    everyone = [made(SCALER, "Scaler")(None) for _ in range(6)]
    for one in everyone:
        one.factor = list(everyone)
    describe(everyone[0])
    assert len(calls) < 1000


@given(PLAIN, PLAIN)
@settings(deadline=None, max_examples=50)
def test_plain_values_are_equal_where_they_are_and_survive_json(one, other):
    assert (describe(one) == describe(other)) == (one == other)
    assert json.loads(json.dumps(describe(one))) == describe(one)


@pytest.mark.parametrize("value", [float("nan"), [float("nan")], functools.partial(max, float("nan")), 1j, b"a", None])
def test_what_was_stored_does_not_differ_from_itself(value):
    told = {"reducers": describe(value)}
    assert differences(json.loads(json.dumps(told)), told) == []


MODULE = """
import enum, functools, json
import torch
class Colour(enum.Enum):
    RED, GREEN, BLUE, BLACK, WHITE = "rgbkw"
K, WORDS = 0.5, {"a", "b"}
class Scaler:
    def __init__(self): self.words, self.k = {"one", "two", "three", "four", "five", "six"}, torch.ones(3)
    def __call__(self, x, m): return helper(x) * K
def helper(x):
    return x in {"one", "two", "three", "four", "five", "six", "seven", "eight"}
def make(k):
    def f(x, m): return helper(x) + K + k
    return f
def everything():
    return [Scaler(), Scaler().__call__, make(1), functools.partial(make(2), m=object()), {"a": (1, "é")}, colours()]
def colours():
    return [set(Colour), Colour.RED]
"""


def test_another_process_with_another_hash_seed_describes_the_same():
    code = MODULE.replace(
        "import torch", "import torch\nfrom activation_extractor._format._fingerprints import describe"
    )
    code += "\nprint(json.dumps(describe(everything())))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here: dict[str, Any] = {"__name__": "__main__"}
    exec(MODULE, here)
    assert json.loads(told.stdout) == describe(here["everything"]())


FUNCTION = describe(made("def add(a, b): return a + b", "add"))


@pytest.mark.parametrize(
    ("there", "now", "text"),
    [
        ({"model": "A"}, {"model": "A"}, []),
        ({"model": "A"}, {"model": "B"}, ["model ('B' in place of 'A')"]),
        ({"model": "A"}, {}, ["model (none in place of 'A')"]),
        ({"a": 1, "b": 1}, {"b": 2, "a": 2}, ["a (2 in place of 1)", "b (2 in place of 1)"]),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3, "x": 1, "z": 4}}, ["a (with z, another y)"]),
        ({"a": dict.fromkeys("wxyz", 1)}, {"a": dict.fromkeys("wxyz", 2)}, ["a (another w and 3 more)"]),
        ({"a": [["h.0", 1], ["h.1", 1]]}, {"a": [["h.1", 1], ["h.2", 1]]}, ["a (without h.0, with h.2)"]),
        ({"a": ["x"]}, {"a": ["x", "y"]}, ["a (with y)"]),
        ({"a": ["v", "w", "x", "y"]}, {"a": ["x", "z"]}, ["a (without v and 2 more, with z)"]),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}, ["a (in another order)"]),
        ({"a": "x" * 99}, {"a": None}, [f"a (none in place of '{'x' * 59})"]),
        ({"a": None}, {"a": "x" * 99}, [f"a ('{'x' * 59} in place of none)"]),
        ({"weights": "4ab1"}, {"weights": "ffd4"}, ["weights"]),
        ({"structure": "4ab1"}, {"structure": "ffd4"}, ["structure of the model"]),
        ({"ids": False}, {"ids": "name"}, ["ids ('name' in place of none)"]),
        ({"ids": "name"}, {"ids": True}, ["ids (callable in place of 'name')"]),
        ({"mask": "m"}, {"mask": {"entry": "p"}}, ["mask (entry 'p' in place of 'm')"]),
        ({"mask": FUNCTION}, {"mask": None}, ["mask (none in place of function 'add')"]),
        ({"mask": FUNCTION}, {"mask": {**FUNCTION, "code": "0"}}, ["mask (another function 'add')"]),
        ({"mask": describe(torch.ones(1))}, {"mask": describe(torch.zeros(1))}, ["mask (another tensor)"]),
        ({"mask": {"type": "A", "state": None}}, {"mask": {"type": "B"}}, ["mask (type 'B' in place of type 'A')"]),
    ],
)
def test_differences_are_told_by_part(there, now, text):
    assert differences(there, now) == text
