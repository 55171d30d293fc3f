"""Blocks without a sink on an accelerator, whichever torch knows; see `test_gpu` for where and when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_accelerator as fake
import numpy as np
import pytest
import torch
from on_accelerator import (
    LENGTHS,
    assert_near,
    batches,
    cnn,
    count_calls,
    images,
    language_model,
    model_call,
    on_both,
    plain_outputs,
    retained,
)
from safetensors.torch import load_file

from activation_extractor import capture, gradients
from activation_extractor.errors import CapacityError, OverwrittenError

if fake.IN_CHILD:
    fake.install()


class WithoutASink:
    """What a block keeps stays where it was computed."""

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_values_stay_there_and_are_as_the_layer_returned_them(self, accelerator: torch.device, mode: Any) -> None:
        expected, found = on_both(accelerator, mode)
        assert {one.device for one in found.values()} == {accelerator}
        assert not any(one.is_inference() for one in found.values())
        assert (found["norm"] < 0).any()  # what the ReLU behind it made zero
        for name in ("conv", "norm", "act", "head"):
            torch.testing.assert_close(found[name].cpu(), expected[name])
        assert found.nbytes == sum(one.nbytes for one in found.values())

    def test_references_are_kept_without_a_copy_and_one_that_was_overwritten_is_an_error(
        self, accelerator: torch.device
    ) -> None:
        model, returned = cnn(accelerator), []
        model.conv.register_forward_hook(lambda module, args, output: returned.append(output.data_ptr()))
        with capture(model, "*", copy=False) as acts:
            model(images().to(accelerator))
        assert acts["conv"].data_ptr() == returned[0]
        with pytest.raises(OverwrittenError, match="'norm'"):
            acts["norm"]

    def test_values_move_to_the_cpu_when_asked_to(self, accelerator: torch.device) -> None:
        expected, found = on_both(accelerator, torch.no_grad, to="cpu")
        assert {one.device for one in found.values()} == {torch.device("cpu")}
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])

    def test_arrays_and_files_hold_the_values(self, tmp_path: Path, accelerator: torch.device) -> None:
        expected, found = on_both(accelerator, torch.inference_mode, dtype=torch.bfloat16)
        found.save(tmp_path / "all.npz")
        found.save(tmp_path / "all.safetensors")
        raw = load_file(tmp_path / "all.safetensors")
        with np.load(tmp_path / "all.npz") as archive:
            for name, array in found.numpy().items():
                assert array.dtype == archive[name].dtype == np.float32
                np.testing.assert_array_equal(array, archive[name])
                np.testing.assert_array_equal(array, raw[name].float().numpy())
                np.testing.assert_allclose(array, expected[name].float().numpy(), atol=0.1)

    def test_gradients_are_those_of_the_cpu(self, accelerator: torch.device) -> None:
        model, (batch,) = language_model("gpt2"), batches(1)

        def backward(device: torch.device | str) -> None:
            arguments = model_call(batch, device)
            hidden = model(**arguments).last_hidden_state
            (hidden.square() * hidden * arguments["attention_mask"][..., None]).sum().backward()

        with plain_outputs(model, "h.*", keep=retained) as outputs:
            backward("cpu")
        expected = {name: output.grad for name, (output,) in outputs.items()}
        outputs.clear()
        model.zero_grad()
        model.to(accelerator)
        with capture(model, gradients("h.*"), reduce=["full", "mean"]) as acts:
            backward(accelerator)
        assert {value.device for value in acts.values()} == {accelerator}
        for name, gradient in expected.items():
            scale = float(gradient.std())
            mean = torch.stack([row[:length].mean(0) for row, length in zip(gradient, LENGTHS, strict=True)])
            assert_near(acts[f"{name}:gradient", "full"], gradient, scale=scale)
            assert_near(acts[f"{name}:gradient", "mean"], mean, scale=scale)

    def test_the_rest_of_a_forward_is_left_out_when_asked_to(self, accelerator: torch.device) -> None:
        expected, _ = on_both(accelerator, torch.no_grad)
        model = cnn(accelerator)
        calls = count_calls(model.head)
        with capture(model, ["conv", "norm"], stop_early=True) as acts:
            assert model(images().to(accelerator)) is None
        assert calls == []
        torch.testing.assert_close(acts["norm"].cpu(), expected["norm"])

    def test_the_memory_that_is_kept_is_bounded(self, accelerator: torch.device) -> None:
        model = cnn(accelerator)
        size = 2 * 4 * 6 * 6 * 4
        with capture(model, ["conv", "norm"], max_bytes=2 * size) as acts:
            model(images().to(accelerator))
        assert acts.nbytes == 2 * size
        with pytest.raises(CapacityError), capture(model, ["conv", "norm"], max_bytes=2 * size - 1):
            model(images().to(accelerator))


if fake.IN_CHILD or torch.accelerator.is_available():
    TestWithoutASink = pytest.mark.gpu(WithoutASink)
else:

    @pytest.mark.gpu
    def test_on_an_accelerator(accelerator: torch.device) -> None:
        """Stands for all of the above where there is none, so that one skip, or one failure, says so."""


if not fake.IN_CHILD:

    def test_all_of_it_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 8
