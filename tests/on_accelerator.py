"""Models, data and comparisons for the tests that run on whatever accelerator torch knows."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fake_time
import pytest
import torch
import transformers as tf
from models import BatchNormNet
from torch import Tensor, nn

from activation_extractor import capture, extract
from activation_extractor.sinks import SafetensorsSink

WORDS, WIDTH, LAYERS, BATCH, SEQ = 50, 16, 3, 4, 8
LENGTHS = torch.tensor([8, 1, 3, 5])
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}  # in standard deviations of a column
ENDS = {"bos_token_id": 1, "eos_token_id": 1}
REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda row: row,
    "mean": lambda row: row.mean(0),
    "first": lambda row: row[0],
    "last": lambda row: row[-1],
    "max": lambda row: row.amax(0),
}
SELECTIONS = {"gpt2": "h.*", "bert": "encoder.layer.*"}


def language_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
        model = tf.GPT2Model(tf.GPT2Config(vocab_size=WORDS, initializer_range=0.3, **sizes, **ENDS))
    else:
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
        model = tf.BertModel(tf.BertConfig(vocab_size=WORDS, initializer_range=0.3, **sizes), add_pooling_layer=False)
    return model.eval().to(dtype)


def batches(count: int, *, padding: str | None = "right", seed: int = 0) -> list[dict[str, Any]]:
    """Token batches with ids and labels; rows have other lengths from batch to batch."""
    generator, given = torch.Generator().manual_seed(seed), []
    for number in range(count):
        mask = (torch.arange(SEQ) < LENGTHS.roll(number)[:, None]).long()
        given.append(
            {
                "input_ids": torch.randint(WORDS, (BATCH, SEQ), generator=generator),
                "id": [f"{seed}-{number}-{row}" for row in range(BATCH)],
                "label": torch.arange(BATCH) + BATCH * number,
                **({"attention_mask": mask if padding == "right" else mask.flip(1)} if padding else {}),
            }
        )
    return given


def extracted(model: nn.Module, layers: str, folder: Path, given: Any, **options: Any) -> Any:
    options = {"reduce": ["mean", "first", "last", "max"], "ids": "id", "keep": "label", "progress": False, **options}
    return extract(model, given, layers, out=folder, **options)


def model_call(batch: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}


@contextmanager
def plain_outputs(
    model: nn.Module, layers: str, keep: Callable[[Tensor], Tensor] = torch.clone
) -> Iterator[dict[str, list[Tensor]]]:
    """What layers return, call by call, with a hook and a dict: nothing of the library has a part in it."""
    outputs: dict[str, list[Tensor]] = {}

    def record(name: str, output: Any) -> None:
        outputs.setdefault(name, []).append(keep(output[0] if isinstance(output, tuple) else output))

    with ExitStack() as handles:
        for name, module in model.named_modules():
            if fnmatch(name, layers) and name.count(".") == layers.count("."):
                hook = module.register_forward_hook(lambda module, args, output, name=name: record(name, output))
                handles.callback(hook.remove)
        yield outputs


def plain_rows(model: nn.Module, layers: str, calls: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """The real positions of each row, ``(positions, features)``, by layer."""
    rows: dict[str, list[Tensor]] = {}
    for call in calls:
        with torch.no_grad(), plain_outputs(model, layers) as outputs:
            model(**call)
        for name, (output,) in outputs.items():
            mask = call.get("attention_mask", torch.ones(output.shape[:2])).bool()
            rows.setdefault(name, []).extend(row[real] for row, real in zip(output, mask, strict=True))
    return rows


def assert_reduced(store: Any, rows: dict[str, list[Tensor]], reduce: list[str]) -> None:
    """A store holds these rows, reduced."""
    for reducer in reduce:
        for layer, expected in rows.items():
            found = list(store[layer, reducer])
            assert len(found) == len(expected)
            for one, row in zip(found, expected, strict=True):
                assert_near(one, REDUCED[reducer](row))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1) -> None:
    """Kernels that are not the same differ in the last bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0, atol=TOLERANCES[dtype] * scale)


def assert_close(found: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    """Two stores hold the same."""
    assert (found.ids, list(found)) == (expected.ids, list(expected))
    kept = [{name: column.torch().tolist() for name, column in one.keep.items()} for one in (found, expected)]
    assert kept[0] == kept[1]
    for key in expected:
        there = list(expected[key])
        scale = float(torch.cat([row.flatten() for row in there]).float().std())
        for row, other in zip(found[key], there, strict=True):
            assert_near(row, other, dtype, scale)


def run_steps(
    model: nn.Module,
    given: list[dict[str, Any]],
    device: torch.device,
    sink: SafetensorsSink,
    reduce: list[str],
    stream: AbstractContextManager[Any] | None = None,
    meet: threading.Barrier | None = None,
) -> None:
    """A step for each batch; threads that meet go on together."""
    with stream or nullcontext(), torch.inference_mode(), capture(model, "h.*", reduce=reduce, sink=sink) as acts:
        for batch in given:
            with acts.step(ids=batch["id"], keep={"label": batch["label"].to(device)}):
                if meet is not None:
                    meet.wait()
                model(**model_call(batch, device))


def count_calls(module: nn.Module, fails_at: int | None = None) -> list[int]:
    """The numbers of the calls of a module; the one with this number raises, once, at the forward's end."""
    calls: list[int] = []

    def count(*_: Any) -> None:
        calls.append(len(calls) + 1)
        if len(calls) == fails_at:
            raise RuntimeError(f"call {fails_at}")

    module.register_forward_hook(count)
    return calls


def retained(output: Tensor) -> Tensor:
    output.retain_grad()
    return output


def shards(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted((folder / "shards").iterdir())}


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn(device: torch.device, dtype: torch.dtype = torch.float32) -> BatchNormNet:
    torch.manual_seed(0)
    return BatchNormNet().eval().to(device, dtype)


def on_both(device: torch.device, mode: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """What blocks keep of a convolution, a norm, and the ReLU that overwrites it: on the CPU and on the device."""
    kept = []
    for place in (torch.device("cpu"), device):
        model = cnn(place, dtype)
        with mode(), capture(model, "*", **options) as acts:
            model(images().to(place, dtype)).add_(1)  # to the head's output
        kept.append(acts)
    return kept


def own_stream(device: torch.device) -> torch.Stream:
    try:
        stream = torch.Stream(device=device)
    except RuntimeError:
        pytest.skip(f"{device.type} has no streams")
    stream.wait_stream(torch.accelerator.current_stream(device))
    return stream


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An error when the CPU waits for the device's work inside of the block."""
    if device.type == fake_time.NAME:
        with fake_time.recorded() as log:
            yield
        assert (log.items, log.host_waits) == (0, 0)
    elif device.type == "cuda":
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    else:
        pytest.skip(f"{device.type} does not tell what waits for it")


def count_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What an allocator of the fake device, which has none, would tell of memory that is made from now on."""
    now = peak = 0
    make = fake_time.Memory.__init__

    def count(self: Any, data: torch.UntypedStorage, stream: int) -> None:
        make(self, data, stream)
        add(data.nbytes())
        weakref.finalize(self, add, -data.nbytes())

    def add(nbytes: int) -> None:
        nonlocal now, peak
        with fake_time.lock:
            now += nbytes
            peak = max(peak, now)

    def tell() -> int:
        nonlocal peak
        told, peak = peak, now
        return told

    monkeypatch.setattr(fake_time.Memory, "__init__", count)
    return tell
