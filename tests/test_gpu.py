"""All of it on an accelerator, whichever torch knows: what comes from there is what a run on the CPU gives.

On a machine that has none one test stands for all, skipped, or failed under REQUIRE_GPU=1. The same tests are run there
in a child process, on the fake device, which hands out poison to whoever does not wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import fake_accelerator as fake
import pytest
import torch
from models import BlockStack
from on_accelerator import (
    BATCH,
    LAYERS,
    SELECTIONS,
    WIDTH,
    assert_close,
    assert_reduced,
    batches,
    count_calls,
    count_memory,
    extracted,
    language_model,
    model_call,
    no_waiting,
    own_stream,
    plain_rows,
    run_steps,
    shards,
)
from torch import nn

from activation_extractor import capture, open_store
from activation_extractor.errors import MaskError, OtherRunError
from activation_extractor.reducers import mean
from activation_extractor.sinks import SafetensorsSink

if fake.IN_CHILD:
    fake.install()


@pytest.fixture
def peak_bytes(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Tells the most memory that the device's allocator had given out at once since it was asked before."""
    if accelerator.type == fake.NAME:
        yield count_memory(monkeypatch)
        return
    allocator = torch.get_device_module(accelerator)  # torch.accelerator tells since torch 2.9 only
    if not hasattr(allocator, "reset_peak_memory_stats"):
        pytest.skip(f"the allocator of {accelerator.type} does not tell")

    def tell() -> int:
        allocator.synchronize()
        peak = allocator.max_memory_allocated(accelerator)
        allocator.reset_peak_memory_stats(accelerator)
        return peak

    yield tell


class Extraction:
    """A data set to disk is what the CPU's store is."""

    @pytest.mark.parametrize("padding", ["left", "right", None])
    @pytest.mark.parametrize("kind", ["gpt2", "bert"])
    def test_it_is_what_the_cpu_gives(
        self, tmp_path: Path, accelerator: torch.device, kind: str, padding: str | None
    ) -> None:
        model, layers, given = language_model(kind), SELECTIONS[kind], batches(3, padding=padding)
        options = {"reduce": ["full", "mean", "first", "last", "max"]}
        expected = extracted(model, layers, tmp_path / "cpu", given, **options)
        rows = plain_rows(model, layers, [model_call(batch) for batch in given])
        found = extracted(model, layers, tmp_path / "there", given, device=accelerator, **options)
        assert {one.device for one in model.parameters()} == {accelerator}
        assert_close(found, expected)
        assert_reduced(found, rows, options["reduce"])

    @pytest.mark.parametrize(
        ("kind", "dtype", "codec"),
        [
            ("gpt2", torch.bfloat16, "safetensors"),
            ("gpt2", torch.float16, "npz"),
            ("gpt2", torch.bfloat16, "npy"),
            ("bert", torch.float16, "safetensors"),
            ("bert", torch.bfloat16, "npz"),
            ("bert", torch.float16, "npy"),
        ],
    )
    def test_half_precision_in_every_format(
        self, tmp_path: Path, accelerator: torch.device, kind: str, dtype: torch.dtype, codec: str
    ) -> None:
        model, layers, given = language_model(kind, dtype), SELECTIONS[kind], batches(2)
        options = {"reduce": ["full", "mean", "last"], "format": codec}
        expected = extracted(model, layers, tmp_path / "cpu", given, **options)
        found = extracted(model.to(accelerator), layers, tmp_path / "there", given, **options)
        assert found.ids == [f"0-{number}-{row}" for number in range(2) for row in range(BATCH)]
        assert found.keep["label"].torch().tolist() == list(range(2 * BATCH))
        assert_close(found, expected, dtype)

    @pytest.mark.parametrize(("position", "text"), [(0, "got none in row 1"), (-1, "got an additive mask")])
    def test_a_mask_that_is_none_is_an_error(
        self, tmp_path: Path, accelerator: torch.device, position: int, text: str
    ) -> None:
        given = batches(2)
        given[1]["attention_mask"][1] = position
        with pytest.raises(MaskError, match=text):
            extracted(BlockStack().to(accelerator), "h.*", tmp_path / "there", given)
        assert list((tmp_path / "there" / "shards").iterdir()) == []

    def test_one_that_failed_in_the_middle_goes_on_and_ends_in_the_same_bytes(
        self, tmp_path: Path, accelerator: torch.device
    ) -> None:
        model, given = language_model("gpt2").to(accelerator), batches(7)
        extracted(model, "h.*", tmp_path / "undisturbed", given, rows_per_unit=2 * BATCH)
        calls = count_calls(model, fails_at=6)
        with pytest.raises(RuntimeError, match="call 6"):
            extracted(model, "h.*", tmp_path / "there", given, rows_per_unit=2 * BATCH)
        there = shards(tmp_path / "there")
        assert list(there) == list(shards(tmp_path / "undisturbed"))[:2]  # of five batches the fifth was unfinished
        assert_close(open_store(tmp_path / "there"), extracted(model.to("cpu"), "h.*", tmp_path / "cpu", given[:4]))
        model.to(accelerator)
        extracted(model, "h.*", tmp_path / "there", given, rows_per_unit=2 * BATCH)
        assert len(calls) == 6 + 4 + 1 + 3  # four on the CPU, one that is stored
        assert shards(tmp_path / "there") == shards(tmp_path / "undisturbed")

    @pytest.mark.filterwarnings("ignore:.*differ by rounding")
    def test_one_that_is_resumed_on_another_device_proves_that_it_is_the_same(
        self, tmp_path: Path, accelerator: torch.device
    ) -> None:
        model, given, folder = language_model("gpt2"), batches(4), tmp_path / "out"
        before = extracted(model.to(accelerator), "h.*", folder, given[:2], rows_per_unit=BATCH)
        assert "cpu" not in before.manifest["computed_with"]["devices"][0]
        extracted(model.to("cpu"), "h.*", folder, given[:3], rows_per_unit=BATCH)
        assert extracted(model.to(accelerator), "h.*", folder, given, rows_per_unit=BATCH).rows == 4 * BATCH
        model.h[1].register_forward_hook(lambda module, args, output: output + 1)
        for device in ("cpu", accelerator):
            with pytest.raises(OtherRunError, match=r"layer 'h\.1' with 'mean' differs by "):
                extracted(model.to(device), "h.*", folder, given, rows_per_unit=BATCH)

    def test_a_block_that_failed_in_the_middle_has_stored_its_finished_steps(
        self, tmp_path: Path, accelerator: torch.device
    ) -> None:
        model, given = BlockStack().eval(), batches(4)
        expected = extracted(model, "h.*", tmp_path / "cpu", given[:3], reduce=["full", "last"])
        count_calls(model.to(accelerator), fails_at=4)
        sink = SafetensorsSink(tmp_path / "there", rows_per_unit=2 * BATCH)
        with pytest.raises(RuntimeError, match="call 4"):
            run_steps(model, given, accelerator, sink, ["full", "last"])
        assert_close(open_store(tmp_path / "there"), expected)

    def test_its_peak_of_memory_does_not_grow_with_the_number_of_steps(
        self, tmp_path: Path, accelerator: torch.device, peak_bytes: Callable[[], int]
    ) -> None:
        model = BlockStack(2, 256).eval().to(accelerator)
        peaks = []
        for count in (10, 10, 40):  # the first warms up
            peak_bytes()
            extracted(model, "h.*", tmp_path / str(len(peaks)), batches(count), reduce=["mean", "last"])
            peaks.append(peak_bytes())
        a_step = 2 * 2 * BATCH * 256 * 4
        assert peaks[1] > 2 * (256 * 256 * 4)  # the weights, at least: something was measured
        assert peaks[2] - peaks[1] < 10 * a_step


class Order:
    """Streams, threads, and memory that is written to and given away again while copies are under way."""

    @pytest.mark.parametrize("reduce", [["mean", "last"], ["full"]])
    @pytest.mark.parametrize("around", ["block", "step", "forward"])
    def test_a_forward_may_run_on_a_stream_of_the_users(
        self, tmp_path: Path, accelerator: torch.device, around: str, reduce: list[str]
    ) -> None:
        model, given = BlockStack(LAYERS, WIDTH).eval(), batches(12)
        stores = []
        for device in (torch.device("cpu"), accelerator):
            model.to(device)
            stream = nullcontext() if device.type == "cpu" else own_stream(device)
            sink = SafetensorsSink(tmp_path / device.type, rows_per_unit=3 * BATCH)
            with (
                torch.inference_mode(),
                stream if around == "block" else nullcontext(),  # entered once: it may not know how to be nested
                capture(model, "h.*", reduce=reduce, sink=sink) as acts,
            ):
                for batch in given:
                    with (
                        nullcontext() if around == "block" else stream,
                        nullcontext() if around == "forward" else acts.step(ids=batch["id"]),
                    ):
                        model(**model_call(batch, device))
            stores.append(open_store(tmp_path / device.type))
        assert_close(stores[1], stores[0])

    @pytest.mark.parametrize("has_stream", [False, True])
    def test_two_threads_with_a_capture_each_on_one_model_get_their_own(
        self, tmp_path: Path, accelerator: torch.device, has_stream: bool
    ) -> None:
        model, given = BlockStack(LAYERS, WIDTH).eval(), [batches(7, seed=1), batches(7, seed=2)]
        expected = [
            extracted(model, "h.*", tmp_path / f"cpu {number}", given[number], reduce=["full", "mean"])
            for number in range(2)
        ]
        model.to(accelerator)
        streams = [own_stream(accelerator) if has_stream else None for _ in range(2)]
        meet = threading.Barrier(2, timeout=60)
        errors: list[BaseException] = []

        def work(number: int) -> None:
            sink = SafetensorsSink(tmp_path / f"there {number}", rows_per_unit=3 * BATCH)
            try:
                run_steps(model, given[number], accelerator, sink, ["full", "mean"], streams[number], meet)
            except BaseException as error:
                meet.abort()
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for number in range(2):
            assert_close(open_store(tmp_path / f"there {number}"), expected[number])

    @pytest.mark.parametrize("reduce", [["mean", "last"], ["full"], ["full", "max"]])
    def test_memory_may_be_overwritten_and_used_again_at_once(
        self, tmp_path: Path, accelerator: torch.device, reduce: list[str]
    ) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))]
        model = nn.Sequential(*layers).eval()
        given = [{"input": torch.randn(BATCH, 1 + number % 5, WIDTH)} for number in range(60)]
        rows = plain_rows(model, "[026]", given)
        model.to(accelerator)
        sink = SafetensorsSink(tmp_path / "there", rows_per_unit=4 * BATCH)
        with torch.inference_mode(), capture(model, "[026]", reduce=reduce, sink=sink):
            for call in given:
                out = model(call["input"].to(accelerator))
                del out
                for size in range(1, 6):  # of the sizes that were freed just now
                    torch.full((BATCH, size, WIDTH), float("nan"), device=accelerator)
        assert_reduced(open_store(tmp_path / "there"), rows, reduce)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(8, 512, 64), (1, 20_000, 3), (3, 1, 5), (2, 7, 3, 4)])
    def test_means_of_half_precision_are_rounded_once(
        self, accelerator: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        for values in (
            torch.randn(shape, device=accelerator).to(dtype),
            torch.rand(shape, device=accelerator).to(dtype),
        ):
            for activation in (values, values.transpose(0, -1).contiguous().transpose(0, -1)):
                assert torch.equal(mean(activation, None), activation.mean(1, dtype=torch.float32).to(dtype))

    @pytest.mark.parametrize("padding", ["left", "right", None])
    def test_a_pooled_step_waits_for_nothing_its_mask_included(
        self, tmp_path: Path, accelerator: torch.device, padding: str | None
    ) -> None:
        model, calls = BlockStack(LAYERS, WIDTH).eval(), [model_call(batch) for batch in batches(4, padding=padding)]
        rows, reduce = plain_rows(model, "h.*", calls), ["mean", "first", "last", "max"]
        model.to(accelerator)
        first, *others = [{name: value.to(accelerator) for name, value in call.items()} for call in calls]
        with torch.inference_mode(), capture(model, "h.*", reduce=reduce, sink=SafetensorsSink(tmp_path / "there")):
            model(**first)  # which makes what the others use: streams, pinned memory
            with no_waiting(accelerator):
                for call in others:
                    model(**call)
        assert_reduced(open_store(tmp_path / "there"), rows, reduce)


if fake.IN_CHILD or torch.accelerator.is_available():
    TestExtraction, TestOrder = map(pytest.mark.gpu, (Extraction, Order))
else:

    @pytest.mark.gpu
    def test_on_an_accelerator(accelerator: torch.device) -> None:
        """Stands for all of the above where there is none, so that one skip, or one failure, says so."""


if not fake.IN_CHILD:

    def test_all_of_it_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 29
