"""Our blocks beside the libraries that a user would pick instead, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.fresh import make_and_leave
from benchmarks.measure import Case, Group, Run
from benchmarks.models import EXPERT_BLOCKS, experts, gpt2, small_layers, tokens
from benchmarks.peers import PEERS, Peer, batch_norms, small_cnn, wrong_values
from benchmarks.sizes import Size
from benchmarks.systems import bare, captured, ready

SLOW = frozenset({"torchlens"})  # seconds a forward
NEED_NO_COPY = frozenset({"baukit", "captum", "surgeon-pytorch"})


def beside(peer: Peer, size: Size) -> Iterator[Case]:
    """A captured call, beside a peer; it has to be cheaper than those whose values are right."""
    model, x = small_layers(size.layers, size.device), torch.randn(4, 16, device=size.device)
    names = [name for name, _ in model.named_children()]
    wrong, of = wrong_on_a_cnn(peer)
    is_slow = peer.name in SLOW
    yield Case(
        name=f"peer.{peer.name}",
        about=f"one captured call, beside {peer.name}, {wrong} of whose {of} BatchNorm outputs are wrong",
        ours=partial(captured, model, x, torch.inference_mode),
        reference=partial(peer_system, peer, model, names, x),
        floor=partial(bare, model, x),
        calls=size.layers,
        loops=1 if is_slow else size.loops,
        target=1.0 if not wrong and peer.package else None,
        most_rounds=15 if is_slow else 31,
    )


def fresh_blocks(size: Size) -> Iterator[Case]:
    """Capturing one forward from scratch, beside the peers that need no copy of the model for it."""
    model, x = experts(158), torch.randn(4, 16)
    for peer in installed_peers():
        if peer.name in NEED_NO_COPY:
            wrong, _ = wrong_on_a_cnn(peer)
            yield Case(
                name=f"set_up.fresh.peer.{peer.name}",
                about=f"making a block around one forward, 12 of 158 modules, beside {peer.name}",
                ours=partial(ready, partial(make_and_leave, model, EXPERT_BLOCKS, partial(model, x)), torch.no_grad),
                reference=partial(ready, partial(prepare_and_run, peer, model, EXPERT_BLOCKS, x), torch.no_grad),
                floor=partial(bare, model, x, torch.no_grad),
                calls=1,
                loops=size.loops,
                target=None if wrong else 1.0,
            )


def hidden_states(size: Size) -> Iterator[Case]:
    """Every block of a transformer, copied, beside the model's own way, which hands out references."""
    model, x = gpt2(size), tokens(size)
    yield Case(
        name="peer.output_hidden_states",
        about="a forward with every block copied, beside transformers' own output_hidden_states",
        ours=partial(captured, model, x, torch.inference_mode, "h.*"),
        reference=partial(with_hidden_states, model, x),
        calls=1,
        loops=size.forwards,
        most_rounds=31,
    )


def installed_peers() -> list[Peer]:
    """The peers that can be measured here."""
    return [peer for peer in PEERS if peer.is_installed]


def missing_peers() -> list[str]:
    """The names of the peers that are not installed."""
    return [peer.name for peer in PEERS if not peer.is_installed]


def wrong_on_a_cnn(peer: Peer) -> tuple[int, int]:
    """How many BatchNorm outputs come back wrong where in-place ReLUs follow, and how many there are."""
    model = small_cnn()
    names = batch_norms(model)
    with torch.inference_mode():
        return wrong_values(peer, model, names, torch.randn(2, 3, 32, 32)), len(names)


@contextmanager
def peer_system(peer: Peer, model: nn.Module, names: list[str], x: Tensor) -> Iterator[Run]:
    """A forward with all layers captured by a peer."""
    with torch.inference_mode(), peer.capturing(model, names) as run:
        yield partial(run, x)


def prepare_and_run(peer: Peer, model: nn.Module, names: list[str], x: Tensor) -> None:
    """A peer made, used once and taken off again."""
    with peer.capturing(model, names) as run:
        run(x)


@contextmanager
def with_hidden_states(model: nn.Module, x: Tensor) -> Iterator[Run]:
    """A forward that hands out what every block returned, by reference."""
    with torch.inference_mode():
        yield partial(model, x, output_hidden_states=True)


PEER_CASES: list[Group] = [
    *(("peer", partial(beside, peer)) for peer in installed_peers()),  # one that fails costs itself alone
    ("set_up", fresh_blocks),
    ("peer", hidden_states),
]
