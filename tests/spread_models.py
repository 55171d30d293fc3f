"""One small model, spread over the processes of a group in each of torch's ways; for functions that `ranks` runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


class Blocks(nn.Module):
    """``(batch, seq, 32)`` to the same, through layers that can be cut by rows and by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.act = nn.ReLU()
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(self.act(self.up(x)))


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Blocks().eval()


def mesh(*sizes: int, names: tuple[str, ...] | None = None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes or (2,), mesh_dim_names=names)


def ddp(seed: int = 0) -> nn.Module:
    return nn.parallel.DistributedDataParallel(plain(seed))


def fsdp2(seed: int = 0) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = plain(seed)
    fully_shard(model.up)
    return fully_shard(model)


def fsdp1(seed: int = 0, *, use_orig_params: bool = False) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = plain(seed)
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def tensor_parallel(seed: int = 0, **plans: object) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(plain(seed), mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel(), **plans})


SPREAD: dict[str, Callable[..., nn.Module]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "FSDP1": fsdp1,
    "tensor parallel": tensor_parallel,
}
