"""What is measured: groups of cases, each a function that yields them.

A new group is a new function in one of the modules beside this one, added to a list there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from benchmarks.buckets import BUCKETS
from benchmarks.calls import CALLS
from benchmarks.engines import ENGINES
from benchmarks.extraction import EXTRACTION
from benchmarks.fresh import FRESH
from benchmarks.inputs import INPUTS
from benchmarks.llama import LLAMA
from benchmarks.measure import Case, Group, UnavailableError
from benchmarks.peer_cases import PEER_CASES
from benchmarks.scaling import SCALING, THREADS
from benchmarks.sizes import Size
from benchmarks.start_up import START_UP
from benchmarks.storage import STORAGE
from benchmarks.taps import TAPS
from benchmarks.tokens import TOKENS
from benchmarks.whole_models import WHOLE_MODELS

GROUPS: list[Group] = [
    *CALLS,
    *FRESH,
    *WHOLE_MODELS,
    *TAPS,
    *SCALING,
    *EXTRACTION,
    *ENGINES,
    *LLAMA,
    *STORAGE,
    *TOKENS,
    *BUCKETS,
    *START_UP,
    *INPUTS,
    *THREADS,  # last, since on a slow machine a round of many threads takes long
]


def all_groups(*, with_peers: bool = False) -> list[Group]:
    """Every group, in the order in which they are shown; its models are made when its cases are."""
    return [*GROUPS, *(PEER_CASES if with_peers else [])]


def all_cases(size: Size, *, with_peers: bool = False) -> Iterator[Case]:
    """Every case that can be measured here."""
    for _, cases in all_groups(with_peers=with_peers):
        with suppress(UnavailableError):
            yield from cases(size)
