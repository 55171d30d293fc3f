"""Streams of accelerators; on a real or a fake one they are tested in `test_gpu` and `test_transfer`."""

from __future__ import annotations

import pytest
import torch

from activation_extractor import _streams
from activation_extractor._streams import current_accelerator, new_stream, use


class OldStream:
    """A stream as torch has it before 2.8: no context."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


@pytest.fixture
def two_devices(monkeypatch):
    """The current stream of each of two devices, and the current device, as torch.accelerator goes about them."""
    state = {"device": 0, 0: OldStream(0), 1: OldStream(1)}

    def set_stream(stream):
        state["device"] = stream.device.index
        state[stream.device.index] = stream

    monkeypatch.setattr(torch.accelerator, "set_stream", set_stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: state["device"])
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: state.update(device=index))
    monkeypatch.setattr(_streams, "current_stream", lambda device: state[device.index])
    return state


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_that_is_no_context_is_used_and_both_stream_and_device_come_back(two_devices, index, fails):
    before, side = dict(two_devices), OldStream(index)
    try:
        with use(side):
            assert two_devices[index] is side
            assert not fails
    except AssertionError:
        assert fails
    assert two_devices == before


def test_a_stream_that_is_a_context_is_entered():
    class NewStream:
        entered = []

        def __enter__(self):
            self.entered.append(True)

        def __exit__(self, *error):
            self.entered.append(False)

    stream = NewStream()
    with use(stream):
        assert stream.entered == [True]
    assert stream.entered == [True, False]


def test_a_build_for_an_accelerator_that_is_not_there_has_none(monkeypatch):
    def current():
        raise RuntimeError("Cannot access accelerator device when none is available.")  # torch 2.6

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert current_accelerator() is None


def test_the_cpu_has_no_streams():
    assert new_stream(torch.device("cpu")) is None
