"""What the original system's base class keeps of structured outputs."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from activation_extractor import IntermediateExtractorBase


class Returns(nn.Module):
    """Returns whatever the function makes of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


def outputs_of(make: Any, x: torch.Tensor) -> Any:
    model = nn.Sequential(Returns(make))
    extractor = IntermediateExtractorBase(model, ["0"])
    extractor.register_hooks()
    model(x)
    extractor.detach_hooks()
    return extractor.get_outputs()["0"]


Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - the plain kind is what is tested


@dataclass(frozen=True)
class Record:
    hidden: torch.Tensor
    note: str


STRUCTURES = {
    "tuple": lambda x: (x, None, x * 2),
    "list": lambda x: [x, "text"],
    "dict": lambda x: {"hidden": x, "count": 3},
    "ordered": lambda x: OrderedDict(hidden=x, more=(x,)),
    "nested": lambda x: ({"a": [x]}, x),
    "namedtuple": lambda x: Pair(x, x + 1),
    "dataclass": lambda x: Record(x, "kept"),
    "model_output": lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)),
    "return_type": lambda x: x.max(1),
}


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Record):
        value = {"hidden": value.hidden, "note": value.note}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, tuple | list):
        for member in value:
            yield from leaves(member)
    else:
        yield value


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_structure_is_kept_and_its_tensors_are_safe(name, grad_mode):
    made = []

    def make(x: torch.Tensor) -> Any:
        made.append(STRUCTURES[name](x))
        return made[0]

    with grad_mode():
        kept = outputs_of(make, torch.randn(2, 3))
        expected = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(made[0])]
        for leaf in leaves(made[0]):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()
    assert type(kept) is type(made[0])
    found = list(leaves(kept))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
            assert not one.is_inference()
        else:
            assert one is other


def test_a_model_output_keeps_its_attributes():
    kept = outputs_of(STRUCTURES["model_output"], torch.ones(2, 3))
    assert torch.equal(kept.last_hidden_state, torch.ones(2, 3))
    assert kept["hidden_states"][1] is kept.hidden_states[1]
    assert kept.attentions is None


class Boxed(MutableMapping):
    """A mapping that holds its members in a dict of its own, which a shallow copy shares."""

    def __init__(self, **members: Any) -> None:
        self.members = members

    def __getitem__(self, key: str) -> Any:
        return self.members[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.members[key] = value

    def __delitem__(self, key: str) -> None:
        del self.members[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


def test_a_mapping_of_another_kind_is_not_written_to():
    x = torch.randn(2, 3, requires_grad=True)
    value = Boxed(hidden=x * 2)
    hidden = value["hidden"]
    outputs_of(lambda _: value, x)
    assert value["hidden"] is hidden
