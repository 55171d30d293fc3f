"""What is measured: each function yields cases, and `CASES` lists the functions.

A new group is a new function in one of the modules beside this one, added to a list there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.calls import CALLS
from benchmarks.extraction import EXTRACTION
from benchmarks.fresh import FRESH
from benchmarks.measure import Case
from benchmarks.peer_cases import PEER_CASES
from benchmarks.scaling import SCALING
from benchmarks.sizes import Size
from benchmarks.start_up import START_UP
from benchmarks.storage import STORAGE
from benchmarks.whole_models import WHOLE_MODELS

CASES: list[Callable[[Size], Iterator[Case]]] = [
    *CALLS,
    *FRESH,
    *WHOLE_MODELS,
    *SCALING,
    *EXTRACTION,
    *STORAGE,
    *START_UP,
]


def all_cases(size: Size, *, with_peers: bool = False) -> Iterator[Case]:
    """Every case, in the order in which they are shown; a model is made when its case is reached."""
    for cases in [*CASES, *(PEER_CASES if with_peers else [])]:
        yield from cases(size)
