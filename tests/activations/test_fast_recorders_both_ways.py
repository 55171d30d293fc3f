"""The fast recorders and the general ones over the same cases: the same values, errors and warnings.

A case is a function that is given `block`, which is `capture` with the options under test, and opens one or more of
them. What a case leaves behind is compared: every value of every block, every step of every sink, the error that the
case ends with, and the warnings on the way.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from models import BatchNormNet, BlockStack, Repeating, count_hooks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from activation_extractor import Activations, MemorySink, capture, position
from activation_extractor._hooks._copied_modules import is_ours
from activation_extractor.activations import _open_block

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
LEFT = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


# -- what a case leaves behind ----------------------------------------------------------------------------------------


def look(value: Any) -> Any:
    """Everything that a user could see of a value."""
    if isinstance(value, list):
        return [look(part) for part in value]
    form = type(value), value.dtype, value.shape, value.requires_grad, value.is_inference(), value.layout
    memory = (value.stride(), value.untyped_storage().nbytes()) if value.layout is torch.strided else None
    return *form, memory, value.detach().to_dense().tolist()


def look_at_error(error: BaseException) -> Any:
    attributes = {name: repr(value) for name, value in vars(error).items()}
    return type(error), str(error), attributes, look_at_error(error.__cause__) if error.__cause__ else None


def read(acts: Activations, key: Any) -> Any:
    try:
        return look(acts[key])
    except Exception as error:
        return look_at_error(error)


def look_at_step(step: Any) -> Any:
    return step.index, step.rows, step.ids, {key: look(value) for key, value in step.values.items()}


Case = Callable[[Any], object]


def outcome(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """What a case leaves behind with these options."""
    torch.manual_seed(0)
    entered: list[Activations] = []
    sinks: list[MemorySink] = []

    @contextmanager
    def block(model: nn.Module, layers: Any, **more: Any) -> Iterator[Activations]:
        more = {**options, **more}
        if more.get("sink"):
            more["sink"], more["copy"] = MemorySink(), True
            more.setdefault("reduce", "mean")
            sinks.append(more["sink"])
        with capture(model, layers, **more) as acts:
            entered.append(acts)
            yield acts
        assert count_hooks(model) == 0

    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case(block)
        except Exception as raised:
            error = look_at_error(raised)
    return {
        "error": error,
        "warnings": [str(warning.message) for warning in caught if warning.category is UserWarning],  # torch has others
        "names": [list(acts) for acts in entered],
        "values": [{key: read(acts, key) for key in acts} for acts in entered],
        "steps": [list(map(look_at_step, sink.steps)) for sink in sinks],
    }


# -- options ----------------------------------------------------------------------------------------------------------


def view(activation: Tensor, mask: Tensor | None) -> Tensor:
    return activation[:, 1]


def masked_sum(activation: Tensor, mask: Tensor | None) -> Tensor:
    return (activation if mask is None else activation * mask[..., None]).sum(1)


def fails_late(activation: Tensor, mask: Tensor | None) -> Tensor:
    if len(activation) == 1:
        raise ZeroDivisionError("no second row")
    return activation[:, 0]


def overwrites(activation: Tensor, mask: Tensor | None) -> Tensor:
    return activation.detach().zero_()[:, 0]


OPTIONS: dict[str, dict[str, Any]] = {
    "copy": {},
    "reference": {"copy": False},
    "mean": {"reduce": "mean"},
    "last": {"reduce": "last"},
    "position": {"reduce": position(-2)},
    "several": {"reduce": ["mean", "last", view, masked_sum]},
    "fails": {"reduce": {"sum": masked_sum, "late": fails_late}},
    "overwrites": {"reduce": [overwrites, "mean"]},
    "wrong rows": {"reduce": {"odd": lambda activation, mask: activation[:1, 0]}},
    "no tensor": {"reduce": {"odd": lambda activation, mask: None}},
    "no rows": {"reduce": {"odd": lambda activation, mask: activation.sum()}},
    "sink": {"reduce": ["mean", view], "sink": True},
    "no mask": {"reduce": ["mean", "last"], "mask": None},
    "mask of its own": {"reduce": "mean", "mask": RIGHT},
    "mask by pattern": {"reduce": "mean", "mask": {"h.1": LEFT, "*": None, "**": "attention_mask"}},
    "axis": {"reduce": "mean", "sequence_axis": 1},
    "other axis": {"reduce": "mean", "sequence_axis": 2, "mask": None},
}
OF_A_STACK = "mask by pattern"  # for a model with these layers


# -- cases ------------------------------------------------------------------------------------------------------------


class Making(nn.Module):
    """A model whose layer returns whatever a function makes of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.forward = make

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.layer(x)


class Pair(NamedTuple):
    nothing: None
    hidden: Tensor


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.use_reentrant = nn.Linear(4, 4), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(lambda x: self.layer(x).relu(), x, use_reentrant=self.use_reentrant)
        return x


class BackwardInForward(nn.Module):
    """Returns the gradient of what a checkpointed layer computes, which runs the layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)
            return torch.autograd.grad(y.sum(), x)[0]


class Recursive(BlockStack):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, again: bool = True) -> Tensor:
        if again:
            self(input_ids, again=False)
        return super().forward(input_ids)


def two_forwards(block, mode, *masks):
    model = BlockStack()
    with mode(), block(model, "h.*"):
        for mask in masks:
            model(TOKENS, attention_mask=mask)


def inference_inside(block):
    model = BlockStack()
    with block(model, "h.*"), torch.inference_mode():
        model(TOKENS, LEFT)


def returning(block, make):
    x, model = torch.randn(2, 5, 4, requires_grad=True), Making(make)
    with block(model, "layer"):
        model(x)


def of_a_dtype(block, dtype):
    returning(block, lambda x: (x * 3).detach().to(dtype))


def repeated(block):
    model, x = Repeating(), torch.randn(2, 5, 4)
    with block(model, "layer"):
        model(x)
        model(x)


def warned_as_an_error(block):
    model = Repeating()
    with block(model, "layer"):
        warnings.simplefilter("error")
        model(torch.randn(2, 5, 4))


def checkpointed(block, use_reentrant):
    model, x = Checkpointed(use_reentrant), torch.randn(2, 5, 4, requires_grad=True)
    with block(model, "layer"):
        model(x).sum().backward()


def checkpointed_alone(block):
    model, x = BlockStack(), torch.randn(2, 5, 8, requires_grad=True)
    with block(model, "h.0", mask=None, missing="skip"):
        checkpoint(model.h[0], x, use_reentrant=False).sum().backward()


def backward_inside(block):
    model = BackwardInForward()
    with block(model, "layer"):
        model(torch.randn(2, 5, 4))


def transformed(block, run, layers="layer", **more):
    model = Making(lambda x: x * 2)
    with block(model, layers, mask=None, **more):
        run(model, torch.randn(3, 2, 5, 4))


def of_gradients(model, x):
    torch.func.grad(lambda x: model(x).sum())(x[0])


def of_products(model, x):
    torch.func.jvp(model, (x[0],), (x[1],))


def of_copies(block):
    model = BlockStack()
    with block(model, "h.*", missing="skip", mask=None):
        twin = copy.deepcopy(model)
        twin(TOKENS)
        copy.copy(model.h[0])(model.embed(TOKENS))
        assert not any(map(is_ours, twin.h[0]._forward_hooks.values()))


def copied_after_a_forward(block):
    model = BlockStack()
    with torch.no_grad(), block(model, "h.*") as acts:
        model(TOKENS)
        assert list(copy.deepcopy(acts)) == list(acts)


def stopped(block):
    model = BlockStack()
    late: list[int] = []
    model.h[3].register_forward_hook(lambda *call: late.append(1))
    with block(model, ["h.2", "h.0"], stop_early=True):
        assert model(TOKENS, attention_mask=RIGHT) is None
        assert model(TOKENS, attention_mask=LEFT) is None
    assert not late
    late.append(model.h[3]._forward_hooks.popitem()[0])


def stopped_beside_another(block):
    model = BlockStack()
    with block(model, "h.2"), block(model, "h.0", stop_early=True):
        assert model(TOKENS) is None


def its_output_needed(block):
    model = BlockStack()
    with block(model, "h.0", stop_early=True):
        model(TOKENS).sum()


def missing(block, **more):
    model = BlockStack()
    with block(model, ["h.0", "h.1"], **more):
        model.h.forward = None
        model.h[0](model.embed(TOKENS)) if more.get("mask", 0) is None else None


def alone(block, **more):
    model = BlockStack()
    with block(model, ["h.0", "h.1"], **more):
        model(TOKENS)
        model.h[0](model.embed(TOKENS[:, :3]))
        model.h[0](model.embed(TOKENS[:, :2]))


def in_another_thread(block):
    model = BlockStack()
    with block(model, "h.*"), ThreadPoolExecutor(1) as pool:
        model(TOKENS)
        pool.submit(model, TOKENS[:1]).result()


def failed_and_caught(block):
    model = BlockStack()
    with block(model, "h.*"):
        handle = model.h[1].register_forward_pre_hook(lambda *call: 1 / 0)
        with suppress(ZeroDivisionError):
            model(TOKENS, LEFT)
        handle.remove()
        model(TOKENS, RIGHT)


def failed(block):
    model = BlockStack()
    with block(model, "h.*"):
        model(TOKENS)
        model(torch.tensor([[99]]))


def one_row_after_two(block):
    model = BlockStack()
    with block(model, "h.*"):
        model(TOKENS)
        model(TOKENS[:1])


def cleared(block):
    model = BlockStack()
    with block(model, "h.*") as acts:
        model(TOKENS)
        acts.clear()
        assert len(acts) == 0
        model(TOKENS[:, :4])


def overwritten(block, mode):
    model = BatchNormNet()
    with mode(), block(model, {"normed": "norm", "conv": "conv"}, missing="skip"):
        model(torch.randn(2, 3, 8, 8))


def tied(block):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    with block(model, ["0", "2.0"]):
        model(torch.randn(2, 5, 4))


def nested(block):
    model = BlockStack()
    with block(model, "h.0"):
        model(TOKENS, LEFT)
        with block(model, {"other": "h.0"}):
            model(TOKENS, RIGHT)


def recursive(block):
    model = Recursive()
    with block(model, "h.1"):
        model(TOKENS, LEFT)


def misfit(block):
    model = BlockStack()
    with block(model, "h.0"):
        model(TOKENS, RIGHT[:, :3])


def in_a_step_block(block):
    model = BlockStack()
    with block(model, "h.1", sink=True) as acts:
        with acts.step(ids=["a", "b"]):
            model(TOKENS, LEFT)
            model(TOKENS, RIGHT)
        model.h[1](model.embed(TOKENS))


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
STACK_CASES: dict[str, Case] = {
    **{
        f"{name}, {text}": partial(lambda block, mode, masks: two_forwards(block, mode, *masks), mode=mode, masks=masks)
        for (name, mode), (text, masks) in itertools.product(
            MODES.items(), {"no mask": [None], "masks": [LEFT, RIGHT], "a mask, then none": [LEFT, None]}.items()
        )
    },
    "inference mode inside of the block": inference_inside,
    "copies of modules": of_copies,
    "a copy of the results": copied_after_a_forward,
    "stopped": stopped,
    "stopped beside another": stopped_beside_another,
    "stopped, its output needed": its_output_needed,
    "nothing ran": missing,
    "nothing ran, skipped": partial(missing, missing="skip"),
    "one of two ran alone": partial(missing, mask=None),
    "alone, with a mask to be asked for": alone,
    "alone": partial(alone, mask=None),
    "in another thread": in_another_thread,
    "failed and caught": failed_and_caught,
    "failed": failed,
    "one row after two": one_row_after_two,
    "cleared": cleared,
    "nested": nested,
    "recursive": recursive,
    "a mask that does not fit": misfit,
    "a step block": in_a_step_block,
}
OTHER_CASES: dict[str, Case] = {
    "tuple": partial(returning, make=lambda x: (None, x * 2)),
    "list in a dict": partial(returning, make=lambda x: {"loss": None, "hidden": [x * 2]}),
    "named tuple": partial(returning, make=lambda x: Pair(None, x * 2)),
    "nothing": partial(returning, make=lambda x: None),
    "text": partial(returning, make=lambda x: ("text", None)),
    "parameter": partial(returning, make=lambda x: nn.Parameter(torch.ones(2, 5, 4))),
    "its input": partial(returning, make=lambda x: x),
    "view": partial(returning, make=lambda x: (x * 2)[:, 1:]),
    "transposed": partial(returning, make=lambda x: (x * 2).transpose(1, 2)),
    "two axes": partial(returning, make=lambda x: x[:, 0] * 2),
    "four axes": partial(returning, make=lambda x: x[..., None] * 2),
    "empty": partial(returning, make=lambda x: x[:0] * 2),
    "conjugate": partial(returning, make=lambda x: (x * 1j).conj()),
    "sparse": partial(returning, make=lambda x: x.detach().to_sparse()),
    **{str(dtype): partial(of_a_dtype, dtype=dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool)},
    "repeated": repeated,
    "a warning that is an error": warned_as_an_error,
    "checkpointed": partial(checkpointed, use_reentrant=True),
    "checkpointed without reentry": partial(checkpointed, use_reentrant=False),
    "backward inside": backward_inside,
    "tied": tied,
    **{f"overwritten, {name}": partial(overwritten, mode=mode) for name, mode in MODES.items()},
}
# The fast way records what a transform has wrapped and raises when it is read or the block ends; the general way raises
# at once and has nothing to read. The block ends with the same error.
TRANSFORMED_CASES: dict[str, Case] = {
    "vmap": partial(transformed, run=lambda model, x: torch.vmap(model)(x)),
    "vmap, skipped": partial(transformed, run=lambda model, x: torch.vmap(model)(x), missing="skip"),
    "vmap, under another name": partial(
        transformed, run=lambda model, x: torch.vmap(model)(x), layers={"other": "layer"}
    ),
    "grad": partial(transformed, run=of_gradients),
    "jvp": partial(transformed, run=of_products),
}


def outcomes(monkeypatch: pytest.MonkeyPatch, case: Case, option: str) -> Iterator[dict[str, Any]]:
    """What a case leaves behind when it is recorded the fast way, and the general way."""
    ways = []

    def spied(*args: Any) -> Any:
        ways.append(make_hook := fast_hooks(*args))
        return make_hook

    fast_hooks = _open_block.fast_hooks
    with monkeypatch.context() as patch:
        patch.setattr(_open_block, "fast_hooks", spied)
        yield outcome(case, OPTIONS[option])
        assert None not in ways
        patch.setattr(_open_block, "fast_hooks", lambda *args: None)
        yield outcome(case, OPTIONS[option])


@pytest.mark.parametrize("case", [*STACK_CASES.values(), *OTHER_CASES.values()], ids=[*STACK_CASES, *OTHER_CASES])
def test_both_ways_of_recording_give_the_same_values_errors_and_warnings(monkeypatch, case):
    for option in OPTIONS if case in STACK_CASES.values() else OPTIONS.keys() - {OF_A_STACK}:
        fast, general = outcomes(monkeypatch, case, option)
        assert fast == general, option


@pytest.mark.parametrize("case", TRANSFORMED_CASES.values(), ids=TRANSFORMED_CASES)
def test_both_ways_end_a_block_around_a_transform_with_the_same_error(monkeypatch, case):
    for option in OPTIONS:
        fast, general = outcomes(monkeypatch, case, option)
        assert fast["error"] == general["error"], option
