"""Models and operators on the fake device give what they give on the CPU."""

from __future__ import annotations

import fake_accelerator as fake
import pytest
import torch
from torch import Tensor, nn

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME)
    LINES = torch.arange(6.0).view(2, 3)


def on_device(values: Tensor) -> Tensor:
    """The values there, arrived."""
    return values.to(DEVICE)


class Operators:
    def test_tensors_are_of_the_plain_class_and_share_storages(self) -> None:
        tensor = on_device(LINES)
        assert type(tensor) is Tensor
        assert tensor.device == torch.device(fake.NAME, 0)
        assert tensor[0].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes

    @pytest.mark.parametrize(
        "compute",
        [
            lambda x: x[1, 1:],
            lambda x: x[:, torch.tensor([2, 0])],
            lambda x: x[x > 2],
            lambda x: torch.where(x > 2, x, 0.0),
            lambda x: torch.cat([x, x]).mean(0),
            lambda x: x.amax(1),
            lambda x: x.argmax(-1),
            lambda x: x.contiguous().view(-1).view(torch.uint8),
            lambda x: x.clone().add_(1).T.contiguous(),
            lambda x: x.softmax(-1) @ x.T,
            lambda x: torch.nn.functional.layer_norm(x, (3,)),
            lambda x: torch.nn.functional.embedding(x.long(), torch.arange(12.0, device=x.device).view(6, 2)),
            lambda x: torch.nn.functional.conv1d(x, torch.ones(2, 2, 2, device=x.device)),
            lambda x: x.bfloat16().float().sort(descending=True).values,
            lambda x: torch.stack([x, torch.zeros_like(x)]).unbind()[0],
            lambda x: x.clone().index_put_((x > 2,), x[1]),
        ],
    )
    def test_an_operator_gives_what_it_gives_on_the_cpu(self, compute) -> None:
        result = compute(on_device(LINES))
        assert result.device.type == fake.NAME
        assert torch.equal(result.cpu(), compute(LINES))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_transformer_with_tied_weights_runs_and_its_hooks_see_device_tensors(self, mode) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ).eval()
        seen, tokens = [], torch.arange(8).view(2, 4)
        with torch.no_grad():  # a graph that is held would keep the weights from being moved
            expected = model(tokens).logits
        model.to(DEVICE).transformer.h[1].register_forward_hook(lambda *call: seen.append(call[2].device.type))
        with mode():
            assert torch.allclose(model(on_device(tokens)).logits.cpu(), expected, atol=1e-5)
        assert seen == [fake.NAME]
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_a_backward_pass_runs(self) -> None:
        layer = nn.Linear(3, 1, bias=False).to(DEVICE)
        layer(on_device(LINES)).sum().backward()
        assert layer.weight.grad.tolist() == [[3, 5, 7]]

    def test_numpy_and_mixing_devices_raise(self) -> None:
        tensor = on_device(LINES)
        with pytest.raises(TypeError, match="can't convert fakedev:0 device type tensor to numpy"):
            tensor.numpy()
        for mix in (lambda: tensor + LINES, lambda: torch.cat([tensor, LINES]), lambda: tensor @ LINES.T):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        assert torch.equal((tensor + torch.tensor(1.0)).cpu(), LINES + 1)

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x[0, 0].item(),
            lambda x: bool(x[0, 0]),
            lambda x: x.nonzero(),
            lambda x: x[x > 2],
            lambda x: x.masked_select(x > 2),
            lambda x: x.clone().index_put_((x > 2,), x[1]),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_what_python_must_know_is_an_item_and_a_wait(self, read) -> None:
        tensor = on_device(LINES)
        with fake.recorded() as log:
            read(tensor)
        assert (log.items, log.host_waits) == (1, 1)

    def test_without_pinned_memory_asking_for_it_raises(self) -> None:
        fake.pinned(False)
        try:
            with pytest.raises(RuntimeError):
                torch.empty(3, pin_memory=True)
        finally:
            fake.pinned(True)


if fake.IN_CHILD:
    TestOperators = Operators
else:

    def test_the_fake_device_in_a_process_of_its_own() -> None:
        assert fake.run_in_child(__file__) >= 20
