"""The libraries beside which we are measured: what the adapters give, and that they undo what they do."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import count_hooks
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from activation_extractor import capture
from benchmarks import peers
from benchmarks.peers import PEERS, Peer, batch_norms, small_cnn, wrong_values

BY_NAME = {peer.name: peer for peer in PEERS}
ALWAYS_THERE = ["bare_hook", "cloning_hook", "seed"]
LINEAR = nn.functional.linear  # as torch has it, before any peer ran
each_peer = pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, marks=pytest.mark.skipif(not peer.is_installed, reason=f"{peer.name} is not installed"))
        for peer in PEERS
    ],
    ids=BY_NAME,
)
their_warnings = pytest.mark.filterwarnings("ignore")  # what other packages warn of is not ours to mend


@each_peer
@their_warnings
def test_every_named_layer_is_given_with_its_value(peer: Peer) -> None:
    model, names, x = nested_layers()
    truths = [(batch, true_values(model, batch)) for batch in (x, x + 1)]
    with peer.capturing(model, names) as run:
        for batch, truth in truths:  # the second call must not give what the first one saw
            found = run(batch)
            assert {name: found[name].shape for name in names} == {"0": (4, 8), "1": (4, 2), "1.0": (4, 2)}
            for name in names:
                torch.testing.assert_close(found[name].detach(), truth[name])


@each_peer
@their_warnings
def test_the_model_and_torch_are_left_as_they_were(peer: Peer) -> None:
    model, names, x = nested_layers()
    before = copy.deepcopy(model)
    attributes = [set(vars(module)) for module in model.modules()]
    with peer.capturing(model, names) as run:
        run(x)
    assert count_hooks(model) == 0
    assert [set(vars(module)) for module in model.modules()] == attributes
    for parameter, untouched in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, untouched)
        assert parameter.requires_grad
    assert nn.functional.linear is LINEAR


@pytest.mark.parametrize("name", ALWAYS_THERE)
def test_an_error_in_the_block_leaves_no_hook(name: str) -> None:
    model, names, _ = nested_layers()
    with pytest.raises(ValueError, match="stop"), BY_NAME[name].capturing(model, names):
        assert count_hooks(model) == len(names)
        raise ValueError("stop")
    assert count_hooks(model) == 0


@each_peer
@their_warnings
def test_wrong_values_can_be_counted_for_every_peer(peer: Peer) -> None:
    model = small_cnn()
    names = batch_norms(model)[:3]
    assert wrong_values(peer, model, names, torch.randn(2, 3, 32, 32)) in range(4)


@pytest.mark.parametrize(("name", "wrong"), [("cloning_hook", 0), ("bare_hook", 15), ("seed", 15)])
def test_an_activation_in_place_spoils_what_is_kept_by_reference(name: str, wrong: int) -> None:
    model = small_cnn()
    assert not model.training
    assert len(batch_norms(model)) == 15
    assert wrong_values(BY_NAME[name], model, batch_norms(model), torch.randn(2, 3, 32, 32)) == wrong


def test_our_own_capture_has_no_wrong_values() -> None:
    @contextmanager
    def ours(model: nn.Module, names: Sequence[str]) -> Iterator[peers.RunOnce]:
        def run(x: Tensor) -> Mapping[str, Tensor]:
            with capture(model, names) as acts:
                model(x)
            return {name: acts[name] for name in names}

        yield run

    model = small_cnn()
    assert wrong_values(Peer("ours", "", "", ours), model, batch_norms(model), torch.randn(2, 3, 32, 32)) == 0


def test_missing_values_and_those_of_another_shape_are_wrong() -> None:
    @contextmanager
    def sloppy(model: nn.Module, names: Sequence[str]) -> Iterator[peers.RunOnce]:
        yield lambda x: {"0": model.get_submodule("0")(x), "1": torch.zeros(())}

    model, names, x = nested_layers()
    assert wrong_values(Peer("sloppy", "", "", sloppy), model, names, x) == len(names) - 1


def test_the_module_imports_where_no_peer_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        if peer.package:
            monkeypatch.setitem(sys.modules, peer.package, None)  # type: ignore[arg-type]  # an import of it raises
    spec = importlib.util.spec_from_file_location("peers_alone", peers.__file__)
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers_alone", alone)  # dataclasses look there
    spec.loader.exec_module(alone)
    assert [peer.name for peer in alone.PEERS if peer.is_installed] == ALWAYS_THERE


def nested_layers() -> tuple[nn.Sequential, list[str], Tensor]:
    """Three Linear layers, two of them inside of another layer; what is asked for lies within each other as well."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2)))
    return model, ["0", "1", "1.0"], torch.randn(4, 4)


def true_values(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What those layers give, each called by hand."""
    with torch.no_grad():
        first = model.get_submodule("0")(x)
        second = model.get_submodule("1.0")(first)
        return {"0": first, "1.0": second, "1": model.get_submodule("1.1")(second)}
