"""Where the sequence is in a layer's activations: what the user says, else what its module is documented to take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from activation_extractor._private_torch import children_of
from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import ModuleTree
from activation_extractor.layers._patterns import Patterns, glob
from activation_extractor.layers._selections import Target
from activation_extractor.reducers._sequence_axis import IMAGE, USUAL, Layout

# What modules are documented to take and return; "..." is any number of axes.
_CHANNELS_SECOND, _ANY_CHANNELS_SECOND = "(batch, channels, time)", "(batch, channels, ...)"
_TIME_FIRST, _BATCH_FIRST = "(time, batch, features)", "(batch, time, features)"
_FEATURES_LAST, _SAME, _UNKNOWN = "(..., features)", "the layout that it is given", ""

_FORMS: dict[str, str] = {
    **dict.fromkeys(["Conv1d", "ConvTranspose1d", "InstanceNorm1d", "MaxUnpool1d", "LPPool1d"], _CHANNELS_SECOND),
    **dict.fromkeys(["MaxPool1d", "AvgPool1d", "AdaptiveMaxPool1d", "AdaptiveAvgPool1d"], _CHANNELS_SECOND),
    **dict.fromkeys(["ReflectionPad1d", "ReplicationPad1d", "ConstantPad1d", "CircularPad1d"], _CHANNELS_SECOND),
    **dict.fromkeys(["BatchNorm1d", "SyncBatchNorm", "GroupNorm", "Upsample"], _ANY_CHANNELS_SECOND),
    **dict.fromkeys(["LocalResponseNorm", "ChannelShuffle"], _ANY_CHANNELS_SECOND),
    **dict.fromkeys(["Conv2d", "ConvTranspose2d", "BatchNorm2d", "InstanceNorm2d", "MaxPool2d", "AvgPool2d"], IMAGE),
    **dict.fromkeys(["LPPool2d", "AdaptiveMaxPool2d", "AdaptiveAvgPool2d", "FractionalMaxPool2d"], IMAGE),
    **dict.fromkeys(["Linear", "Bilinear", "Embedding", "MultiheadAttention", "RNNBase"], _FEATURES_LAST),
    **dict.fromkeys(["Identity", "Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout"], _SAME),
}
_TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
)  # fmt: skip
# Classes of other libraries, of which no attribute says it.
_XLNET = "transformers.models.xlnet.modeling_xlnet.XLNet"
_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys([f"{_XLNET}{name}" for name in ("Layer", "RelativeAttention", "FeedForward")], _TIME_FIRST),
    **dict.fromkeys([f"{_XLNET}{name}" for name in ("Model", "LMHeadModel")], _BATCH_FIRST),
    **dict.fromkeys(["esm.modules.TransformerLayer", "esm.multihead_attention.MultiheadAttention"], _TIME_FIRST),
}
_SEQUENCES = ("input", "query", "key", "value", "src", "tgt", "memory")  # arguments in the layout of the output


class Layouts:
    """The layouts of a model's layers.

    Args:
        sequence_axis: what `check_sequence_axis` returns.
        model: the plain model.

    Raises:
        ArgumentError: a pattern matches no layer.
    """

    def __init__(self, sequence_axis: Any, model: nn.Module) -> None:
        self._tree = ModuleTree(model)
        self._modules: dict[str, nn.Module | None] = {}
        self._forms: dict[int, frozenset[str]] = {}
        self._siblings: dict[int, frozenset[str]] = {}
        self._children: dict[int, tuple[list[str], dict[str, int]]] = {}  # names, and the place of each
        self._of_same: dict[str, Layout | None] = {}
        by_pattern = sequence_axis if isinstance(sequence_axis, Mapping) else {}
        self._axis = None if by_pattern is sequence_axis else sequence_axis
        self._patterns, self._axes = Patterns(by_pattern), list(by_pattern.values())
        for pattern in by_pattern:
            if self._at(pattern) is None and not any(map(glob(pattern).fullmatch, self._tree.modules)):
                raise ArgumentError("a pattern in sequence_axis", "match a layer of the model", pattern)

    def of(self, target: Target) -> Layout:
        """The layout of what is recorded of a target."""
        if (place := self._patterns.first(target.layer)) is not None:
            return Layout(self._axes[place], lacks_sequence=self._axes[place] is None)
        if self._axis is not None:
            return Layout(self._axis)
        is_taken = target.side == "input" and _is_sequential(target.module)
        layout = _taken(target.module) if is_taken else self._known(target.layer, target.module)
        return self._assumed(target.layer, target.module) if layout is None else _of_part(target, layout)

    def _known(self, layer: str, module: nn.Module) -> Layout | None:
        """What the module, a transformer around it, or a module before it in a `Sequential` is documented to return."""
        if (layout := _own_layout(module)) is not None:
            return layout
        if _is_sequential(module) and len(children_of(module)):
            return self._known_at(layer, list(children_of(module))[-1])
        around = self._around(layer)
        transformer = next((outer for outer in around if isinstance(outer, _TRANSFORMERS)), None)
        if transformer is not None:
            return _own_layout(transformer)
        if _form(module) == _SAME and around and _is_sequential(around[0]):
            return self._given(layer, around[0])
        return None

    def _given(self, layer: str, sequence: nn.Module) -> Layout | None:
        """What a module that returns the layout which it is given is given in a `Sequential`; each is asked once."""
        prefix, _, name = layer.rpartition(".")
        if id(sequence) not in self._children:
            names = list(children_of(sequence))
            self._children[id(sequence)] = names, {child: place for place, child in enumerate(names)}
        names, places = self._children[id(sequence)]
        if name not in places:  # a name of its own that holds a dot
            return None
        place, passed = places[name], []
        while (layer := _below(prefix, names[place])) not in self._of_same:
            module = self._at(layer)
            if module is None or _form(module) != _SAME or _own_layout(module) is not None:
                self._of_same[layer] = None if module is None else self._known(layer, module)
            elif place == 0:
                following = self._at(_below(prefix, names[1])) if len(names) > 1 else None
                self._of_same[layer] = None if following is None else _taken(following)
            else:
                passed.append(layer)
                place -= 1
        self._of_same.update(dict.fromkeys(passed, self._of_same[layer]))
        return self._of_same[layer]

    def _known_at(self, prefix: str, name: str) -> Layout | None:
        module = self._at(layer := _below(prefix, name))
        return None if module is None else self._known(layer, module)

    def _assumed(self, layer: str, module: nn.Module) -> Layout:
        """The usual layout, with a doubt where modules in the layer or beside it have another one."""
        parent = next(iter(self._around(layer)), module)
        if _TIME_FIRST in self._forms_in(parent):
            return Layout(of_three=0, doubt=f"in or beside a module that takes {_TIME_FIRST}")
        inside = self._forms_in(module)
        if id(parent) not in self._siblings:
            children = children_of(parent).values()
            self._siblings[id(parent)] = frozenset(_form(child) for child in children if child is not None)
        siblings = self._siblings[id(parent)]
        is_of_convolutions = _CHANNELS_SECOND in inside and _FEATURES_LAST not in inside
        if is_of_convolutions or (_CHANNELS_SECOND in siblings and next(module.parameters(), None) is None):
            return Layout(of_three=2, doubt=f"in or beside modules that take {_CHANNELS_SECOND}")
        return USUAL

    def _around(self, layer: str) -> list[nn.Module]:
        """The modules around a layer, the innermost first."""
        around = []
        while layer:
            layer = layer.rpartition(".")[0]
            if (module := self._at(layer)) is not None:
                around.append(module)
        return around

    def _at(self, layer: str) -> nn.Module | None:
        if layer not in self._modules:
            found = self._tree.find(layer)
            self._modules[layer] = None if found is None else found[1]
        return self._modules[layer]

    def _forms_in(self, module: nn.Module) -> frozenset[str]:
        """What a module and those in it are documented to take; each module is visited once."""
        if (known := self._forms.get(id(module))) is not None:
            return known
        self._forms[id(module)] = frozenset()
        layout, forms = _own_layout(module), {_form(module)}
        if layout is not None and layout.form:
            forms.add(layout.form)
        for child in children_of(module).values():
            if child is not None:
                forms |= self._forms_in(child)
        self._forms[id(module)] = found = frozenset(forms)
        return found


def _own_layout(module: nn.Module) -> Layout | None:
    """What a module alone says; None when it says nothing."""
    batch_first = vars(module).get("batch_first")  # `getattr` takes a microsecond where there is none
    if isinstance(module, _TRANSFORMERS):
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) and len(module.layers):
            return _own_layout(module.layers[0])
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            batch_first = getattr(module.self_attn, "batch_first", None)
    if isinstance(batch_first, bool):
        return Layout(of_three=int(batch_first), form=_BATCH_FIRST if batch_first else _TIME_FIRST)
    kind: Any = type(module)
    return _layout_of(kind)


def _taken(module: nn.Module) -> Layout | None:
    """What a module alone, or the first one in a `Sequential` that says something, is documented to take."""
    if _is_sequential(module):
        children = (child for child in children_of(module).values() if child is not None and _form(child) != _SAME)
        first = next(children, None)
        return None if first is None else _taken(first)
    return _own_layout(module)


def _of_part(target: Target, layout: Layout) -> Layout:
    """The layout of the part of a value that is recorded: states and parts that are computed may have another one."""
    select, has_parts = target.select, hasattr(target.module, "batch_first")
    if select is None or (target.side == "input" and select in _SEQUENCES):
        return layout
    if not callable(select) and (select == 0 or (target.side == "input" and select in (1, 2))):
        return layout if not isinstance(target.module, nn.RNNBase) or select == 0 else _part_in_doubt(target)
    if isinstance(target.module, nn.MultiheadAttention) and target.side != "input" and select == 1:
        return USUAL  # the weights, (batch, seq, keys)
    return _part_in_doubt(target) if has_parts or not layout.is_usual else layout


def _part_in_doubt(target: Target) -> Layout:
    return Layout(of_three=0, doubt=f"the part select={target.select!r} of what a {type(target.module).__name__} has")


def _form(module: nn.Module) -> str:
    """What a module's class, or the one of torch that it derives from, is documented to take."""
    kind: Any = type(module)
    return _form_of(kind)


@lru_cache
def _form_of(kind: type[Any]) -> str:
    bases = [base for base in kind.__mro__ if base.__module__.startswith("torch.")]
    form = next((_FORMS[base.__name__] for base in bases if base.__name__ in _FORMS), _UNKNOWN)
    is_activation = bool(bases) and bases[0].__module__ == nn.ReLU.__module__
    return _SAME if is_activation and not form else form


@lru_cache
def _layout_of(kind: Any) -> Layout | None:
    """What a class of modules says, if its forward is torch's: another one may take another layout."""
    definer = next(base for base in kind.__mro__ if "forward" in vars(base))
    if (known := _ELSEWHERE.get(f"{definer.__module__}.{definer.__qualname__}")) is not None:
        return Layout(of_three=int(known == _BATCH_FIRST), form=known)
    form = _form_of(kind) if definer.__module__.startswith("torch.") else _UNKNOWN
    if form == IMAGE:
        return Layout(form=IMAGE)
    if form == _CHANNELS_SECOND:
        return Layout(of_three=2, form=form)
    return Layout(of_three=2) if form == _ANY_CHANNELS_SECOND else None


def _is_sequential(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is nn.Sequential.forward


def _below(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
