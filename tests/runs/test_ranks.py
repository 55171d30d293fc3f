"""Which units a rank takes: its own, and then what others leave."""

from __future__ import annotations

import pytest

from activation_extractor.errors import ArgumentError, ArgumentTypeError
from activation_extractor.runs._ranks import Remaining, Share, sharded_by, share_of

VARIABLES = ["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in [*VARIABLES, "PMI_RANK", "PMI_SIZE"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Share(1, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, Share(2, 3)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Share(0, 2)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6"}, Share(5, 6)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(0, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
    ],
    ids=str,
)
def test_auto_reads_what_launchers_say(monkeypatch, variables, share):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert share_of("auto") == share
    assert share_of(None) is None


def test_a_rank_may_be_given():
    assert share_of((1, 3)) == Share(1, 3)
    assert share_of((0, 1)) is None


@pytest.mark.parametrize("share", ["all", 1, (1,), (0.0, 2), (True, 2), "0/2"])
def test_a_share_of_another_kind_is_an_error(share):
    with pytest.raises(ArgumentTypeError, match="share must be 'auto', None or"):
        share_of(share)


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_none_of_the_ranks_is_an_error(share):
    with pytest.raises(ArgumentError, match="ranks counted from 0, got"):
        share_of(share)


class Ranks:
    """Ranks that compute units in steps of a clock; those in `dead` never do."""

    def __init__(self, world: int, units: int, dead=(), slow=None, seconds: float = 1.0) -> None:
        self.now, self.world, self.seconds = 0.0, world, seconds
        self.stored: set[int] = set()
        self.computed: list[tuple[int, int]] = []
        own = {rank: [unit for unit in range(units) if unit % world == rank] for rank in range(world)}
        self.jobs = [self.work(rank, own[rank], units, (slow or {}).get(rank, 1)) for rank in range(world)]
        self.alive = {rank: self.jobs[rank] for rank in range(world) if rank not in dead}
        self.wake = dict.fromkeys(self.alive, 0.0)

    def work(self, rank: int, own: list[int], units: int, factor: float):
        overtaken = 0

        def compute(unit: int):
            nonlocal overtaken
            if unit not in self.stored:
                yield self.seconds * factor
                overtaken += unit in self.stored
                self.stored.add(unit)
                self.computed.append((rank, unit))

        for unit in own:
            yield from compute(unit)
        pauses: list[float] = []
        remaining = Remaining(
            Share(rank, self.world),
            look=lambda: [unit for unit in range(units) if unit not in self.stored],
            unit_seconds=lambda: self.seconds * factor,
            overtaken=lambda: overtaken,
            clock=lambda: self.now,
            sleep=lambda seconds: pauses.append(seconds),
        )
        # one look at a time: what the rank does next, or how long it sleeps
        while missing := remaining._look():
            if chosen := remaining._choose(missing):
                before = overtaken
                for unit in chosen:
                    yield from compute(unit)
                remaining._is_fast = overtaken == before
            else:
                yield 0.05

    def run(self) -> float:
        while self.alive:
            rank = min(self.alive, key=lambda one: self.wake[one])
            self.now = self.wake[rank]
            try:
                self.wake[rank] += next(self.alive[rank])
            except StopIteration:
                del self.alive[rank]
        return self.now


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("units", [1, 7, 40])
def test_equal_ranks_compute_each_unit_once(world, units):
    ranks = Ranks(world, units)
    ranks.run()
    assert sorted(unit for _, unit in ranks.computed) == list(range(units))


@pytest.mark.parametrize("dead", [{0}, {3}, {1, 2}, {0, 1, 2}])
def test_what_dead_ranks_leave_is_computed_by_the_others_and_hardly_anything_twice(dead):
    ranks = Ranks(4, 40, dead)
    seconds = ranks.run()
    assert ranks.stored == set(range(40))
    assert len(ranks.computed) <= 40 + 4
    assert seconds < 40 / (4 - len(dead)) + 15


def test_a_last_unit_of_many_dead_ranks_is_computed_too():
    ranks = Ranks(8, 8, dead={1, 2, 3, 4, 5, 6, 7})
    ranks.run()
    assert ranks.stored == set(range(8))


@pytest.mark.parametrize("factor", [2, 5, 20])
def test_a_slow_rank_costs_few_units_twice_and_is_helped(factor):
    ranks = Ranks(4, 80, slow={2: factor})
    seconds = ranks.run()
    assert len(ranks.computed) <= 80 + 4
    assert seconds < 20 * factor or factor < 5


def test_a_rank_waits_for_others_as_long_as_units_appear():
    now, stored = [0.0], {0}

    def sleep(seconds: float) -> None:
        now[0] += seconds
        stored.add(int(now[0] / 2))

    options = {"unit_seconds": lambda: 1.0, "overtaken": lambda: 0, "clock": lambda: now[0], "sleep": sleep}
    look = lambda: [unit for unit in range(10) if unit not in stored and unit < 8]  # noqa: E731
    assert Remaining(Share(0, 2), look, **options).wait() == []
    assert 14 <= now[0] < 17
    assert Remaining(Share(0, 2), lambda: [9], **options).wait() == [9]


class Loader:
    def __init__(self, **members) -> None:
        self.__dict__.update(members)


def test_data_sets_that_ranks_have_parts_of_are_known():
    assert sharded_by([1, 2]) is None
    assert sharded_by(Loader(sampler=Loader(num_replicas=1))) is None
    assert sharded_by(Loader(batch_sampler=Loader(sampler=Loader(num_replicas=4)))) == "Loader"
    assert sharded_by(Loader(batch_sampler=Loader(num_processes=2))) == "Loader"
