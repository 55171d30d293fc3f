"""What users can rely on, as data: names, signatures, attributes; and the run whose stores are kept."""

from __future__ import annotations

import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

LISTING = Path(__file__).with_name("public.json")
STORES = Path(__file__).with_name("stores_of_0_1")
"""Written by release 0.1.0: the run below with `extract`, in units of two rows, and in a with-block."""
IDS = [["a", "b"], ["c", "d", "e"], ["f"]]
MODULES = {
    "activation_extractor": (),
    "activation_extractor.activations": ("Activations",),
    "activation_extractor.cli": ("main",),
    "activation_extractor.errors": (),
    "activation_extractor.examples": (),
    "activation_extractor.extractors.intermediateExtractor": ("IntermediateExtractor",),
    "activation_extractor.extractors.intermediateExtractorBase": ("IntermediateExtractorBase",),
    "activation_extractor.plots": (),
    "activation_extractor.pytest_plugin": (),
    "activation_extractor.reducers": (),
    "activation_extractor.runs": ("Columns", "Window"),
    "activation_extractor.sinks": (),
    "activation_extractor.store": (),
    "activation_extractor.testing": (),
}
"""The modules that users import from, with what they take from those that have no ``__all__``."""


class Scaled(nn.Module):
    """Multiplies by a weight that is the same on every machine and in every release of torch."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), factor))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(batch, seq, 3)`` to the same."""
        return hidden * self.weight


class ScaledStack(nn.Module):
    """Two of them, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Scaled(2.0), Scaled(3.0)])

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``(batch, seq, 3)`` to the same."""
        for block in self.h:
            hidden = block(hidden)
        return hidden


def batches() -> list[dict[str, Any]]:
    """Three batches of six rows: ids, a kept column, lengths that differ."""
    found = []
    start = 0
    for ids in IDS:
        lengths = torch.arange(start, start + len(ids)) % 4 + 1
        start += len(ids)
        values = torch.arange(len(ids) * 4 * 3, dtype=torch.float32).reshape(len(ids), 4, 3) + start
        mask = (torch.arange(4)[None, :] < lengths[:, None]).long()
        found.append({"hidden": values, "attention_mask": mask, "id": ids, "length": lengths})
    return found


def listing() -> dict[str, Any]:
    """Every public name with its signature, a class with its public members."""
    found = {}
    for path, names in MODULES.items():
        module = importlib.import_module(path)
        found[path] = {name: described(getattr(module, name)) for name in names or sorted(module.__all__)}
    return found


def described(value: Any) -> Any:
    """One public name."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        bases = [base.__name__ for base in value.__mro__[1:] if base.__name__ not in ("object", "BaseException")]
        return {"bases": bases, "parameters": _parameters(value.__init__)[1:]}
    if inspect.isclass(value) and not issubclass(value, enum.Enum):
        annotated = {name for base in value.__mro__ for name in vars(base).get("__annotations__", {})}
        members = {name: getattr(value, name, None) for name in {*dir(value), *annotated} if name[0] != "_"}
        return {name: _parameters(member) if callable(member) else "" for name, member in sorted(members.items())}
    return _parameters(value) if callable(value) else type(value).__name__


def _parameters(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    kind = {inspect.Parameter.KEYWORD_ONLY: "keyword "}
    return [f"{kind.get(each.kind, '')}{star.get(each.kind, '')}{each.name}" for each in parameters]


if __name__ == "__main__":
    LISTING.write_text(json.dumps(listing(), indent=1) + "\n", encoding="utf-8")
