"""How much work the cases are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How much work a case is.

    Attributes:
        layers: of the model that shows pure overhead.
        set_up_layers: the numbers of layers for which entering and leaving is measured.
        loops: runs of 200 small layers in one timing; other cases scale it to about the same time.
        batches: of a whole extraction.
        megabytes: MiB that are written to or read from the disk in one run.
        shards: of the store that is opened.
        whole_megabytes: MiB that are written by the run whose memory is measured.
        cold_megabytes: MiB of the store that is read cold.
    """

    layers: int = 200
    set_up_layers: tuple[int, ...] = (10, 200, 1000)
    loops: int = 5
    batches: int = 64
    megabytes: int = 128
    shards: int = 1000
    whole_megabytes: int = 4096
    cold_megabytes: int = 1024


QUICK = Size(loops=2, batches=16, megabytes=64, whole_megabytes=512, cold_megabytes=256)
SMALLEST = Size(
    layers=3,
    set_up_layers=(3,),
    loops=1,
    batches=2,
    megabytes=1,
    shards=3,
    whole_megabytes=4,
    cold_megabytes=4,
)
