"""How much work the cases are, and where it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decoder:
    """A Llama-shaped decoder with random weights, and what it is given; about 1 billion parameters by default.

    Attributes:
        layers: of the decoder.
        width: of its hidden states.
        inner_width: of its MLPs.
        heads: for queries.
        key_value_heads: for keys and values.
        vocabulary: tokens that it knows.
        rows: samples of a batch.
        seq: tokens of a sample.
        batches: of a pooled extraction; at this size 64 of them are a unit of the store.
        whole_batches: of an extraction of whole activations, 256 MiB each at this size.
        new_tokens: of a decoding loop.
    """

    layers: int = 16
    width: int = 2048
    inner_width: int = 8192
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 32_000
    rows: int = 8
    seq: int = 512
    batches: int = 130
    whole_batches: int = 32
    new_tokens: int = 32


TINY_DECODER = Decoder(2, 16, 32, 2, 1, 50, rows=2, seq=8, batches=3, whole_batches=2, new_tokens=3)


@dataclass(frozen=True)
class Size:
    """How much work a case is, and on what device.

    Attributes:
        layers: of the model that shows pure overhead.
        set_up_layers: the numbers of layers for which entering and leaving is measured.
        fresh_modules: the numbers of modules of the models on which blocks are made anew.
        scales: the numbers of layers between which the cost of a layer is compared.
        threads: the numbers of threads that share a model.
        loops: runs of 200 small layers in one timing; other cases scale it to about the same time.
        blocks: of the transformer.
        new_tokens: that it generates.
        batches: of a whole extraction.
        backend: what compiles a model.
        megabytes: MiB that are written to or read from the disk in one run.
        shards: of the store that is opened.
        whole_megabytes: MiB that are written by the run whose memory is measured.
        cold_megabytes: MiB of the store that is read cold.
        input_rows: of a file that is read.
        decoder: the model of real size.
        device: where models run.
    """

    layers: int = 200
    set_up_layers: tuple[int, ...] = (10, 200, 1000)
    fresh_modules: tuple[int, ...] = (50, 158, 1022, 10_022)
    scales: tuple[int, ...] = (1, 10, 100, 1000)
    threads: tuple[int, ...] = (1, 4, 16, 64)
    loops: int = 5
    blocks: int = 12
    new_tokens: int = 16
    batches: int = 64
    backend: str = "inductor"
    megabytes: int = 128
    shards: int = 1000
    whole_megabytes: int = 4096
    cold_megabytes: int = 1024
    input_rows: int = 1_000_000
    decoder: Decoder = Decoder()
    device: torch.device = CPU

    @property
    def has_accelerator(self) -> bool:
        """Whether models run on another device than the CPU, whose work is waited for at the end of a timing alone."""
        return self.device.type != "cpu"

    @property
    def forwards(self) -> int:
        """Forwards of a transformer in one timing: on an accelerator enough for the wait at the end not to matter."""
        return 2 * self.loops if self.has_accelerator else 1


QUICK = Size(
    loops=2, batches=16, megabytes=64, whole_megabytes=512, cold_megabytes=256, input_rows=100_000, decoder=TINY_DECODER
)
SMALLEST = Size(
    layers=3,
    set_up_layers=(3,),
    fresh_modules=(50,),
    scales=(1, 3),
    threads=(1, 2),
    loops=1,
    blocks=4,
    new_tokens=2,
    batches=2,
    backend="eager",
    megabytes=1,
    shards=3,
    whole_megabytes=4,
    cold_megabytes=4,
    input_rows=1000,
    decoder=TINY_DECODER,
)
