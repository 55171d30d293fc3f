"""From an accelerator to the host: what is copied, in how many pieces, and that nothing is read before it is there.

The accelerator is a fake one that hands out poison to whoever does not wait, so right values prove that we did.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fake_accelerator as fake
import pytest
import torch
from models import BlockStack
from torch import Tensor, nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, _streams, capture, extract, open_store
from activation_extractor.errors import MaskError
from activation_extractor.sinks import Sink, Step
from activation_extractor.sinks import _transfer as transfer_module
from activation_extractor.sinks._transfer import Arrival, Transfer

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME, 0)

BLOCKS, WIDTH, BATCH, SEQ = 12, 8, 4, 6
POOLED_BYTES = BLOCKS * 2 * BATCH * WIDTH * 4  # mean and last
VERDICT_BYTES = 3 * 8


def batches(count: int, *, has_mask: bool = True) -> list[dict[str, Any]]:
    """Token batches in which each row has another number of real positions."""
    torch.manual_seed(0)
    lengths = torch.tensor([6, 1, 3, 4])
    mask = (torch.arange(SEQ) < lengths[:, None]).long()
    return [
        {
            "input_ids": torch.randint(50, (BATCH, SEQ)),
            "id": [f"{number}-{row}" for row in range(BATCH)],
            **({"attention_mask": mask} if has_mask else {}),
        }
        for number in range(count)
    ]


def stack(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return BlockStack(BLOCKS, WIDTH).eval().to(dtype)


def extracted(model: nn.Module, folder: Path, given: list[Any], **options: Any) -> Any:
    options = {"reduce": ["mean", "last"], "ids": "id", "progress": False, **options}
    return extract(model, given, "h.*", out=folder, **options)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Two stores hold the same; kernels that are not the same differ in the last bits."""
    assert found.ids == expected.ids
    assert list(found) == list(expected)
    for key in expected:
        for here, there in zip(found[key], expected[key], strict=True):
            assert here.dtype == there.dtype
            assert torch.allclose(here, there, atol=tolerance)


class Pooled:
    """Extraction with reducers, to disk."""

    def test_only_pooled_bytes_are_copied_in_one_piece_a_step_and_the_values_are_right(self, tmp_path: Path) -> None:
        expected = extracted(stack(), tmp_path / "cpu", batches(5))
        model, given = stack().to(DEVICE), batches(5)
        with fake.recorded() as log:
            found = extracted(model, tmp_path / "there", given)
        steps = [copy for copy in log.to_host if copy[1]]
        assert [nbytes for nbytes, *_ in steps] == [POOLED_BYTES + VERDICT_BYTES] * 5
        assert_same(found, expected)

    def test_the_forward_is_never_waited_for(self, tmp_path: Path) -> None:
        model = stack().to(DEVICE)
        sink = SafetensorsSink(tmp_path / "store")
        given = [{name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask")} for batch in batches(5)]
        with torch.inference_mode(), capture(model, "h.*", reduce=["mean", "last", "max", "first"], sink=sink):
            with fake.recorded() as log:
                for batch in given:
                    model(**batch)
            assert (log.items, log.host_waits) == (0, 0)
            assert len(log.to_host) == 5
            assert all(stream != torch.accelerator.current_stream(DEVICE).stream_id for *_, stream in log.to_host)

    def test_the_number_of_copies_is_that_of_the_steps_whatever_the_layers_and_dtypes(self, tmp_path: Path) -> None:
        model = stack(torch.bfloat16).to(DEVICE)
        model.h[11].register_forward_hook(lambda module, args, output: output.float())
        with fake.recorded() as log:
            store = extracted(model, tmp_path / "there", batches(3))
        assert len([copy for copy in log.to_host if copy[1]]) == 3
        assert store["h.2", "mean"].dtype == torch.bfloat16
        assert store["h.11", "mean"].dtype == torch.float32
        assert not store["h.11", "last"].torch().isnan().any()

    def test_a_wait_that_is_left_out_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Arrival, "wait", lambda self: None)
        store = extracted(stack().to(DEVICE), tmp_path / "there", batches(2, has_mask=False))
        assert store["h.0", "mean"].torch().isnan().all()

    def test_kept_columns_and_ids_travel_with_the_activations(self, tmp_path: Path) -> None:
        given = [{**batch, "label": torch.arange(BATCH).to(DEVICE)} for batch in batches(2)]
        with fake.recorded() as log:
            store = extracted(stack().to(DEVICE), tmp_path / "there", given, keep="label")
        assert store.keep["label"].torch().tolist() == [0, 1, 2, 3] * 2
        assert [nbytes for nbytes, waits_not, _ in log.to_host if waits_not] == [
            POOLED_BYTES + VERDICT_BYTES + BATCH * 8
        ] * 2

    @pytest.mark.parametrize("sink", [NpySink, NpzSink, SafetensorsSink])
    def test_every_format_holds_what_a_run_on_the_cpu_does(self, tmp_path: Path, sink: Any) -> None:
        for name, device in (("cpu", torch.device("cpu")), ("there", DEVICE)):
            model = stack(torch.bfloat16).to(device)
            with torch.inference_mode(), capture(model, "h.*", reduce=["full", "last"], sink=sink(tmp_path / name)):
                for batch in batches(3):
                    model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        assert_same(open_store(tmp_path / "there"), open_store(tmp_path / "cpu"), tolerance=0.2)


class Streams:
    """Forwards on streams of the user's and of the model's own."""

    @pytest.mark.parametrize("reduce", ["mean", "full"])
    def test_a_step_may_end_on_another_stream_that_has_waited(self, tmp_path: Path, reduce: str) -> None:
        given = batches(4)
        expected = extracted(stack(), tmp_path / "cpu", given, reduce=reduce)
        model, side = stack().to(DEVICE), torch.Stream(device=DEVICE)
        side.wait_stream(torch.accelerator.current_stream(DEVICE))
        with torch.inference_mode(), capture(model, "h.*", reduce=reduce, sink=tmp_path / "there") as acts:
            for batch in given:
                with acts.step(ids=batch["id"]):
                    with side:
                        model(batch["input_ids"].to(DEVICE), batch["attention_mask"].to(DEVICE))
                    torch.accelerator.current_stream(DEVICE).wait_stream(side)
        assert_same(open_store(tmp_path / "there"), expected)

    def test_a_mask_is_fitted_for_each_stream_that_reads_it(self) -> None:
        class TwoStreams(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.there, self.here = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor, attention_mask: Tensor) -> None:
                main, side = torch.accelerator.current_stream(DEVICE), torch.Stream(device=DEVICE)
                side.wait_stream(main)
                with side:
                    self.there(x)
                self.here(x)
                main.wait_stream(side)

        model, x, mask = TwoStreams().eval().to(DEVICE), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
        with torch.inference_mode(), capture(model, ["there", "here"], reduce="mean") as acts:
            model(x.to(DEVICE), mask.to(DEVICE))
        for name in ("there", "here"):
            layer = model.get_submodule(name).to("cpu")
            expected = torch.stack([layer(x[0, :2]).mean(0), layer(x[1]).mean(0)])
            assert torch.allclose(acts[name].cpu(), expected, atol=1e-5)


class Whole:
    """Activations that are kept whole."""

    @pytest.mark.parametrize("has_mask", [True, False])
    @pytest.mark.parametrize("parcel_bytes", [64 * 2**20, 1000, 1])
    def test_they_are_what_a_run_on_the_cpu_gives(
        self, tmp_path: Path, has_mask: bool, parcel_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = batches(3, has_mask=has_mask)
        expected = extracted(stack(), tmp_path / "cpu", given, reduce="full")
        monkeypatch.setattr(transfer_module, "PARCEL_BYTES", parcel_bytes)
        assert_same(extracted(stack().to(DEVICE), tmp_path / "there", given, reduce="full"), expected)

    def test_a_mask_is_looked_at_once_a_step(self, tmp_path: Path) -> None:
        model, (batch,) = stack().to(DEVICE), batches(1)
        ids, mask = batch["input_ids"].to(DEVICE), batch["attention_mask"].to(DEVICE)
        with capture(model, "h.*", sink=tmp_path / "store") as acts, acts.step(ids=batch["id"]):
            with fake.recorded() as in_forward:
                model(ids, mask)
            assert (in_forward.items, in_forward.host_waits) == (0, 0)
            end = ExitStack()
            at_end = end.enter_context(fake.recorded())
        end.close()
        assert at_end.items == 1  # where the real positions are; how many a row has is a copy


class OneStep(Sink):
    """A user's sink."""

    def __init__(self, reads_later: bool) -> None:
        self.reads_later = reads_later
        self.steps: list[Step] = []

    def write(self, step: Step) -> None:
        self.steps.append(step)


class Masks:
    """Masks that are none: seen when they arrive, and before anything of the unit is on disk."""

    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            (lambda mask: mask * torch.tensor([[1], [0], [1], [1]]), "a real position in every row, got none in row 1"),
            (lambda mask: (mask - 1) * 10, "hold zeros and ones, got an additive mask"),
            (lambda mask: (mask - 1.0) * 1e4, "hold zeros and ones, got an additive mask"),
        ],
    )
    def test_an_empty_row_or_an_additive_mask_is_an_error_and_writes_nothing(
        self, tmp_path: Path, spoil: Any, text: str
    ) -> None:
        given = batches(3)
        given[1]["attention_mask"] = spoil(given[1]["attention_mask"])
        with pytest.raises(MaskError, match=text) as caught:
            extracted(stack().to(DEVICE), tmp_path / "there", given, rows_per_unit=BATCH)
        assert caught.value.__notes__ == ["found when the values of step 1 had arrived on the CPU"]
        assert [one.name for one in (tmp_path / "there" / "shards").iterdir()] == ["00000000.safetensors"]

    @pytest.mark.parametrize("reads_later", [True, False])
    def test_a_sink_says_whether_masks_are_checked_before_it_is_given_a_step(self, reads_later: bool) -> None:
        (batch,), sink, model = batches(1), OneStep(reads_later), stack().to(DEVICE)
        mask = batch["attention_mask"].clone()
        mask[2] = 0
        ids, mask = batch["input_ids"].to(DEVICE), mask.to(DEVICE)
        with ExitStack() as block:
            acts = block.enter_context(capture(model, "h.*", reduce="mean", sink=sink))
            step = acts.step()
            step.__enter__()
            with fake.recorded() as in_forward:
                model(ids, mask)
            assert (in_forward.items, in_forward.host_waits) == (0, 0)
            if reads_later:
                step.__exit__(None, None, None)
                with pytest.raises(MaskError, match="none in row 2"):
                    sink.steps[0].check_masks()
            else:
                with pytest.raises(MaskError, match="none in row 2"):
                    step.__exit__(None, None, None)
                assert sink.steps == []


class TheTransfer:
    """`Transfer` alone."""

    def test_the_source_may_go_and_its_memory_be_written_to_at_once(self) -> None:
        transfer, arrival = Transfer(), Arrival()
        values = {name: torch.full((3, 5), float(number)) for number, name in enumerate("abc")}
        sources = {name: value.to(DEVICE) for name, value in values.items()}
        hosts = transfer.to_host(sources, arrival)
        for source in sources.values():
            source.zero_()
        sources.clear()
        arrival.wait()
        assert all(torch.equal(hosts[name], values[name]) for name in values)

    def test_dtypes_and_shapes_of_all_kinds_travel_in_one_piece(self) -> None:
        values: dict[str, Tensor] = {
            "bool": torch.tensor([True, False, True]),
            "double": torch.randn(3, 1, dtype=torch.float64),
            "bf16": torch.randn(5, 3).bfloat16(),
            "fp8": torch.randn(7).to(torch.float8_e4m3fn),
            "empty": torch.randn(0, 4),
            "transposed": torch.randn(4, 3).T,
            "complex": torch.randn(3, dtype=torch.complex64),
            "one": torch.tensor(3, dtype=torch.int16),
            "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
            "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
            "alike": torch.randn(5, 3).bfloat16(),
            "alike_too": torch.randn(3, 5).bfloat16().T,
        }
        arrival = Arrival()
        sources = {name: value.to(DEVICE) for name, value in values.items()}
        with fake.recorded() as log:
            hosts = Transfer().to_host(sources, arrival)
        assert len(log.to_host) == 1
        arrival.wait()
        for name, value in values.items():
            assert hosts[name].dtype == value.dtype
            assert torch.equal(hosts[name].view(torch.uint8) if name == "fp8" else hosts[name], as_compared(value))

    def test_what_is_on_the_cpu_stays_the_same_tensor_and_is_not_waited_for(self) -> None:
        tensor = torch.randn(3)
        with fake.recorded() as log:
            hosts = Transfer().to_host({"here": tensor}, Arrival())
        assert hosts["here"] is tensor
        assert (log.to_host, log.host_waits) == ([], 0)

    def test_without_pinned_memory_values_are_right(self) -> None:
        arrival = Arrival()
        fake.pinned(False)
        try:
            hosts = Transfer().to_host({"a": torch.ones(3).to(DEVICE), "b": torch.zeros(2).to(DEVICE)}, arrival)
        finally:
            fake.pinned(True)
        arrival.wait()
        assert (hosts["a"].tolist(), hosts["b"].tolist()) == ([1, 1, 1], [0, 0])

    def test_a_device_without_streams_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_streams, "has_streams", lambda kind: False)
        arrival = Arrival()
        with fake.recorded() as log:
            hosts = Transfer().to_host({"a": torch.ones(3).to(DEVICE), "b": torch.zeros(2).to(DEVICE)}, arrival)
        assert [waits_not for _, waits_not, _ in log.to_host] == [False]
        assert (hosts["a"].tolist(), hosts["b"].tolist()) == ([1, 1, 1], [0, 0])

    def test_memory_that_copies_need_is_pinned(self) -> None:
        with fake.recorded() as log:
            Transfer().to_host({"a": torch.ones(3).to(DEVICE), "b": torch.zeros(2).to(DEVICE)}, Arrival())
        assert log.pinned_bytes == 5 * 4


def as_compared(value: Tensor) -> Tensor:
    return value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value


if fake.IN_CHILD:
    TestPooled, TestStreams, TestWhole, TestMasks, TestTheTransfer = Pooled, Streams, Whole, Masks, TheTransfer
else:

    def test_transfers_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 25
