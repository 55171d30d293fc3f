"""The original system's base class: hooks that stay until they are taken off, outputs in a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from activation_extractor._hooks._copied_modules import hide_ours, ours, show_all
from activation_extractor._private_torch import clear_forward_hooks, forward_hooks
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import check_model
from activation_extractor.layers._selections import resolve
from activation_extractor.layers._structures import copied


class IntermediateExtractorBase:
    """Collects what the listed layers of a model return, call by call, from `register_hooks` to `detach_hooks`.

    New code is better served by `activation_extractor.capture`, which takes its hooks off by itself.

    Args:
        model: the PyTorch model.
        layer_list: names of its layers; a pattern or any other selection of layers that `capture` takes works too.

    Attributes:
        hook_handles: the handles of the hooks that are registered.
        intermediate_outputs: layer name to what its last call returned, in the layer's own structure; its tensors are
            copies, safe from later in-place writes and free of the autograd graph.

    Raises:
        LayerNotFoundError: a name is not in the model; the text holds close matches.
        ArgumentTypeError: `model` is not a module.
        ArgumentError: the list selects inputs, gradients or parts of outputs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from activation_extractor import IntermediateExtractorBase
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> extractor = IntermediateExtractorBase(model, ["0"])
        >>> extractor.register_hooks()
        >>> _ = model(torch.randn(2, 4))
        >>> extractor.detach_hooks()
        >>> extractor.get_outputs()["0"].shape
        torch.Size([2, 8])
    """

    def __init__(self, model: nn.Module, layer_list: Sequence[str]) -> None:
        self.model = check_model(model)
        targets = resolve(model, layer_list)
        if any(target.side != "output" or target.select is not None or target.part_of for target in targets):
            advice = "Use activation_extractor.capture for inputs, gradients and select=."
            raise ArgumentError("layer_list", "select layers, whose whole outputs are kept", layer_list, advice)
        self._modules = {target.name: target.module for target in targets}
        self.layer_list = list(self._modules)
        self.hook_handles: list[RemovableHandle] = []
        self.intermediate_outputs: dict[str, Any] = {}

    def create_hook(self, layer_name: str) -> Callable[..., None]:
        """A forward hook that stores what its module returns under `layer_name`.

        Args:
            layer_name: the name to store it under.

        Returns:
            The hook, for ``module.register_forward_hook``.
        """
        return _Place(self, layer_name).store_output

    def register_hooks(self) -> None:
        """Attach a hook to every layer of the list; harmless when they are attached already.

        A copy or pickle of the model, made while they are attached, carries none of them.
        """
        self.detach_hooks()
        for name, module in self._modules.items():
            self.hook_handles.append(module.register_forward_hook(self.create_hook(name)))
        hide_ours(map(forward_hooks, self._modules.values()))

    def detach_hooks(self) -> None:
        """Take off the hooks that `register_hooks` attached; harmless when there are none."""
        while self.hook_handles:
            self.hook_handles.pop().remove()
        show_all(map(forward_hooks, self._modules.values()))

    def clear_all_hooks(self) -> None:
        """Take off ALL forward hooks of every module of the model, whoever attached them."""
        self.detach_hooks()
        for module in self.model.modules():
            clear_forward_hooks(module)

    def get_outputs(self) -> dict[str, Any]:
        """What the layers returned so far: `intermediate_outputs` itself."""
        return self.intermediate_outputs


class _Place:
    """Where a hook stores what its module returns. A copy, as that of a hook in a copy of a model, stores nothing."""

    def __init__(self, extractor: IntermediateExtractorBase | None, layer_name: str) -> None:
        self._extractor, self._layer_name = extractor, layer_name

    def __reduce__(self) -> Any:
        return _Place, (None, self._layer_name)

    @ours
    def store_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._extractor is not None:
            self._extractor.intermediate_outputs[self._layer_name] = copied(output)
