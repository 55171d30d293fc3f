"""Taps that come and go while blocks are open, and forwards that users set behind instrument()."""

from __future__ import annotations

import copy

import pytest
import torch
from compiling import MASK, X, assert_same, compiled, eagerly, every_backend, make, quiet
from torch import nn

from activation_extractor import MemorySink, capture, inputs, instrument
from activation_extractor.errors import StepError

pytestmark = quiet


@pytest.mark.parametrize("options", [{}, {"calls": "all"}, {"sink": MemorySink()}], ids=["last", "all", "sink"])
def test_a_block_whose_taps_are_taken_off_says_so_when_it_ends(options):
    model = make()
    handle = instrument(model, "h.*")
    run, _ = compiled(model, "eager")
    with (
        torch.no_grad(),
        pytest.raises(StepError, match=r"got handle.remove\(\) inside of the block"),
        capture(model, "h.0", **options),
    ):
        run(X)
        handle.remove()
        run(X + 1)


def test_taps_that_a_block_does_not_use_or_another_handle_keeps_may_go():
    model = make()
    handle, kept = instrument(model, "h.*"), instrument(model, "h.0")
    run, _ = compiled(model, "eager")
    with torch.no_grad(), capture(model, "h.0", calls="all") as acts:
        run(X)
        handle.remove()
        run(X)
    assert len(acts["h.0"]) == 2
    kept.remove()


def test_an_error_of_the_body_is_not_hidden_by_taps_that_went():
    model = make()
    with pytest.raises(KeyError), instrument(model, "h.*") as handle, capture(model, "h.0"):
        handle.remove()
        raise KeyError


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
def test_taps_that_come_while_a_block_is_open_change_nothing_in_it():
    model = make()
    run, _ = compiled(model, "eager")
    with torch.no_grad():
        with capture(model, "h.*", calls="all") as acts:
            run(X)
            handle = instrument(model, ["h.*", "h.*.a"])
            run(X)
            handle.remove()
            run(X)
        assert [len(values) for values in acts.values()] == [3, 3, 3]


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
def test_a_forward_that_is_set_behind_instrument_stays_and_is_copied():
    model = make()
    handle = instrument(model, ["h.*", "h.*.a"])
    own = torch.compile(model.forward, backend="eager", fullgraph=True)
    model.forward = own
    with torch.no_grad(), capture(model, ["h.*", "h.*.a"]) as acts:
        model(X)
    assert_same(acts, eagerly(make(), ["h.*", "h.*.a"], X))
    assert "forward" in vars(copy.copy(model))
    handle.remove()
    assert vars(model)["forward"] is own
    assert "forward" not in vars(model.h[0])


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@every_backend
def test_complex_values_are_recorded_and_complex_arguments_leave_masks_alone(backend):
    class Transformed(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x, dim=1)

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.b = Transformed(), nn.Identity(), nn.Linear(16, 16)

        def forward(self, x, extra, attention_mask=None):
            spectrum = self.g(self.f(x).conj() * extra)
            return self.b(torch.fft.irfft(spectrum, n=5, dim=1))

    model, layers = make(kind=Spectral), ["f", "g", "b", inputs("g")]
    extra = torch.randn(2, 3, 16, dtype=torch.complex64)
    instrument(model, layers)
    run, counter = compiled(model, backend)
    with torch.no_grad():
        for _ in range(2):
            with capture(model, layers) as acts:
                run(X, extra, MASK)
            with capture(model, "b", reduce="mean") as means:
                run(X, extra, MASK)
    assert_same(acts, eagerly(model, layers, X, extra, MASK))
    assert_same(means, eagerly(model, "b", X, extra, MASK, reduce="mean"))
    assert counter.frame_count == 1
