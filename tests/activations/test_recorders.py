"""What happens to a recorded value: copied, referenced, reduced, moved, counted."""

from __future__ import annotations

import pytest
import torch
from models import count_hooks
from torch import nn

from activation_extractor import capture, gradients, position
from activation_extractor.errors import (
    CapacityError,
    DuplicateLayerError,
    InferenceReferenceError,
    OverwrittenError,
    ReducerError,
    SequenceAxisError,
)


def test_a_copy_keeps_the_layout_of_the_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    with capture(model, "0") as acts:
        out = model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert acts["0"].stride() == out.stride()
    assert acts["0"].data_ptr() != out.data_ptr()


def test_reading_twice_gives_the_same_tensor(stack, tokens):
    with torch.inference_mode(), capture(stack, "h.0") as acts:
        stack(tokens)
    assert acts["h.0"] is acts["h.0"]


def test_a_reference_shares_the_models_memory(stack, tokens):
    seen = []
    stack.h[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with capture(stack, "h.0", copy=False) as acts:
        stack(tokens)
    assert acts["h.0"].data_ptr() == seen[0].data_ptr()
    assert not acts["h.0"].requires_grad


@pytest.mark.parametrize("calls", ["last", "all", "join"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_reference_that_was_overwritten_is_an_error_on_reading_that_names_the_layer(cnn, mode, calls):
    with mode(), capture(cnn, ["norm", "conv"], copy=False, calls=calls, sequence_axis=2) as acts:
        cnn(torch.randn(2, 3, 8, 8))
    assert acts["conv"] is not None
    with pytest.raises(OverwrittenError) as caught:
        acts["norm"]
    assert caught.value.layer == "norm"
    assert str(caught.value) == (
        "The value of layer 'norm', kept with copy=False, was written to after the layer returned it. "
        "Leave copy=False out to keep it as the layer returned it."
    )
    assert "overwritten" in repr(acts)
    with mode(), capture(cnn, "norm") as acts:
        cnn(torch.randn(2, 3, 8, 8))
    assert acts["norm"].min() < 0


def test_references_are_refused_under_inference_mode(stack, tokens):
    text = "copy=False cannot be used under torch.inference_mode: its tensors have no version counters"
    with torch.inference_mode(), pytest.raises(InferenceReferenceError, match=text), capture(stack, "h.0", copy=False):
        pass
    with pytest.raises(InferenceReferenceError), capture(stack, "h.0", copy=False), torch.inference_mode():
        stack(tokens)
    assert count_hooks(stack) == 0


def test_a_reference_with_detach_off_is_the_value_itself(stack, tokens):
    with capture(stack, "h.3", copy=False, detach=False) as acts:
        out = stack(tokens)
    assert acts["h.3"] is out


def test_several_reducers_are_kept_side_by_side(stack, tokens):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with capture(stack, "h.1", reduce=["full", "mean", "FT", "LT", "max", position(1)]) as acts:
        stack(tokens, attention_mask=mask)
    whole = acts["h.1", "full"]
    assert torch.equal(acts["h.1", "first"], torch.stack([whole[0, 1], whole[1, 0]]))
    assert torch.equal(acts["h.1", "LT"], torch.stack([whole[0, 4], whole[1, 2]]))
    assert torch.equal(acts["h.1", "position(1)"], torch.stack([whole[0, 2], whole[1, 1]]))
    assert torch.equal(acts["h.1", "max"][0], whole[0, 1:].amax(0))
    torch.testing.assert_close(acts["h.1", "mean"][1], whole[1, :3].mean(0))


def test_reducers_can_be_named_and_two_of_one_name_are_an_error(stack, tokens):
    with capture(stack, "h.1", reduce={"norm": lambda activation, mask: activation.norm(dim=(1, 2))}) as acts:
        stack(tokens)
    assert acts["h.1", "norm"].shape == (2,)
    with pytest.raises(DuplicateLayerError, match="got 'mean' for two reducers"):
        capture(stack, "h.1", reduce=["mean", "mean"])


def test_a_reducer_that_returns_a_view_owns_its_memory_all_the_same(stack, tokens):
    def second(activation, mask):
        return activation[:, 1]

    with capture(stack, "h.0", reduce=[second, "last"]) as acts:
        stack(tokens)
    for name in ("second", "last"):
        assert acts["h.0", name].untyped_storage().nbytes() == 2 * 8 * 4


@pytest.mark.parametrize(
    ("result", "got"),
    [(None, "a NoneType"), (torch.ones(3, 2), r"shape \(3, 2\) for 2 rows"), (torch.tensor(1.0), r"shape \(\)")],
)
def test_a_reducer_that_returns_something_else_is_an_error(stack, tokens, result, got):
    text = f"'odd' must return a tensor with a row for each sample, got {got}.* for layer 'h.0'"
    with pytest.raises(ReducerError, match=text):
        with capture(stack, "h.0", reduce={"odd": lambda activation, mask: result}):
            stack(tokens)
    assert count_hooks(stack) == 0


def test_images_need_their_axes_named(cnn):
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(SequenceAxisError) as caught, capture(cnn, "conv", reduce="mean"):
        cnn(images)
    assert str(caught.value) == (
        "The activation of layer 'conv' must have shape (batch, seq, features), got shape (2, 4, 6, 6). "
        "Pass sequence_axis= (for images (2, 3)), or reduce='full'."
    )
    with capture(cnn, "conv", reduce=["mean", "full"], sequence_axis=(2, 3)) as acts:
        cnn(images)
    torch.testing.assert_close(acts["conv", "mean"], acts["conv", "full"].mean((2, 3)))


def test_what_is_kept_is_moved_to_a_device(stack, tokens):
    with capture(stack, "h.0", reduce=["full", "mean"], to="meta") as acts:
        stack(tokens)
    assert {acts[key].device.type for key in acts} == {"meta"}
    with capture(stack, "h.0", to="cpu") as acts:
        stack.h[1].register_forward_pre_hook(lambda module, args: (args[0].detach().zero_(),))
        stack(tokens)
    assert acts["h.0"].abs().sum() > 0  # moving to the same device is a copy too


def test_more_than_max_bytes_is_an_error_that_names_the_layer(stack, tokens):
    one = 2 * 5 * 8 * 4
    with pytest.raises(CapacityError) as caught, capture(stack, "h.*", max_bytes=2 * one):
        stack(tokens)
    assert str(caught.value) == (
        "With layer 'h.2' the block would keep 960 bytes, more than max_bytes=640. Reduce in the block, capture fewer "
        "layers, write to a sink, or raise max_bytes."
    )
    assert isinstance(caught.value, MemoryError)
    assert count_hooks(stack) == 0


@pytest.mark.filterwarnings("ignore:The model ran")
def test_max_bytes_counts_what_is_kept_not_what_has_passed(stack, tokens):
    one = 2 * 5 * 8 * 4
    with capture(stack, "h.*", max_bytes=5 * one) as acts:
        for _ in range(10):
            stack(tokens)
    assert acts.nbytes == 4 * one
    with pytest.raises(CapacityError), capture(stack, "h.*", max_bytes=5 * one, calls="all"):
        for _ in range(10):
            stack(tokens)


def test_max_bytes_counts_storages_once_and_whole():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.part = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.part(self.whole(x)[:, -1])

    model, x = Views(), torch.randn(2, 10, 8)
    with torch.no_grad(), capture(model, "part", copy=False) as acts:
        model(x)
    assert acts.nbytes == x.nbytes  # the slice keeps all of it alive
    with torch.no_grad(), capture(model, "*", copy=False, max_bytes=x.nbytes) as acts:
        model(x)
    assert acts.nbytes == x.nbytes


@pytest.mark.filterwarnings("ignore:The model ran")
def test_max_bytes_counts_reduced_values_as_what_they_are(stack, tokens):
    with capture(stack, "h.*", reduce="mean", max_bytes=4 * 2 * 8 * 4) as acts:
        stack(tokens)
        stack(tokens)
    assert acts.nbytes == 4 * 2 * 8 * 4


def test_gradients_can_be_reduced_moved_and_capped_like_outputs(stack, tokens):
    with capture(stack, gradients("h.*"), reduce="mean", to="cpu", max_bytes=4 * 2 * 8 * 4) as acts:
        stack(tokens).sum().backward()
    assert acts["h.0:gradient"].shape == (2, 8)
    with pytest.raises(CapacityError), capture(stack, gradients("h.*"), max_bytes=100):
        stack(tokens).sum().backward()


def test_a_parameter_that_a_layer_returns_is_kept_as_a_plain_tensor():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.weight

    model = nn.ModuleDict({"constant": Constant()})
    for copy in (True, False):
        with capture(model, "constant", copy=copy) as acts:
            model["constant"]()
        assert not acts["constant"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_is_kept_as_it_is(dtype):
    model = nn.Sequential(nn.Identity())
    x = torch.randint(0, 2, (2, 3, 4)).to(dtype)
    with torch.inference_mode(), capture(model, "0") as acts:
        model(x)
    assert torch.equal(acts["0"], x)
    assert acts["0"].dtype == dtype
