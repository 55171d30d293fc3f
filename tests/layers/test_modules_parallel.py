"""DataParallel over several devices: it calls replicas of what it holds, each in a thread of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models import Block
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from activation_extractor import capture
from activation_extractor.errors import UnhookableLayerError
from activation_extractor.layers._modules import check_model
from activation_extractor.layers._selections import resolve


def test_a_layer_in_a_data_parallel_over_devices_is_refused(stack):
    parallel = parallel_on(2, stack)
    model = nn.Sequential(parallel, nn.Identity())
    for layers in ("0", "0.h.1", "0.module.h.1", "0.h.*", "**", Block, stack.h[1], parallel, {"mine": "0.h.1"}):
        with pytest.raises(UnhookableLayerError) as caught:
            capture(model, layers)
        assert str(caught.value) == (
            "Layer '0' must be an ordinary module that runs, got DataParallel over 2 devices. "
            "Capture its `.module` on one device, or use DistributedDataParallel with a capture per process."
        )
        assert caught.value.layer == "0"
    assert resolve(check_model(parallel.module), "h.1")[0].module is stack.h[1]


def test_a_data_parallel_over_devices_is_named_in_full(stack):
    model = nn.Sequential(parallel_on(2, nn.Identity()), checkpoint_wrapper(parallel_on(3, stack)))
    with pytest.raises(UnhookableLayerError, match=r"^Layer '1\._checkpoint_wrapped_module' .* over 3 devices"):
        resolve(model, "1.h.1")


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper, partial(torch.compile, backend="eager")])
def test_a_data_parallel_over_devices_is_refused_as_the_model(stack, wrap):
    with pytest.raises(UnhookableLayerError, match="got DataParallel over 2 devices"):
        check_model(wrap(parallel_on(2, stack)))
    allowed = wrap(parallel_on(1, stack))
    assert check_model(allowed) is allowed


@torch.no_grad()
def test_layers_beside_a_data_parallel_over_devices_are_captured(stack, tokens, monkeypatch):
    parallel = parallel_on(2, stack)
    monkeypatch.setattr(parallel, "forward", lambda x: stack(x), raising=False)  # there may be no two devices
    model = nn.Sequential(parallel, nn.Linear(8, 2))
    for layers in ("1", "", "1*", model[1]):
        with capture(model, layers) as acts:
            expected = model(tokens)
        assert all(torch.equal(value, expected) for value in acts.values())


def parallel_on(devices: int, module: nn.Module) -> nn.DataParallel:
    parallel = nn.DataParallel(module)
    parallel.device_ids = list(range(devices))
    return parallel
