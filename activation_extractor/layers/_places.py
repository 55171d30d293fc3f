"""Whether modules are still where they were in a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from activation_extractor._private_torch import children_of
from activation_extractor.layers._modules import WRAPPER_SEGMENTS, unwrap

Link = tuple[dict[str, nn.Module | None], str, nn.Module | None]  # a module's children, the name of one, and that one


class Places:
    """The places of layers in a model, as they were when this was made."""

    def __init__(self, root: nn.Module, layers: Iterable[str]) -> None:
        links: dict[tuple[int, str], Link] = {}
        self._is_unknown = False
        for layer in layers:
            self._is_unknown |= not _follow(root, layer, links)
        self._links = tuple(links.values())

    def may_have_changed(self) -> bool:
        """Whether another module may stand where a layer stood, or a module around it."""
        return self._is_unknown or any(children.get(name) is not child for children, name, child in self._links)


def _follow(module: nn.Module | None, layer: str, links: dict[tuple[int, str], Link]) -> bool:
    """Add what leads to a layer; returns False where that is no plain way."""
    segments = layer.split(".") if layer else []
    while module is not None and unwrap(module) is module:
        children = children_of(module)
        links |= {(id(children), it): (children, it, None) for it in WRAPPER_SEGMENTS}  # with one it would be a wrapper
        if not segments:
            return True
        if (segment := segments.pop(0)) not in children:
            return False
        module = children[segment]
        links[id(children), segment] = children, segment, module
    return False
