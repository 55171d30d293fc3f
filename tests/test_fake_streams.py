"""The fake device catches the mistakes that it is there to catch, and lets right code pass."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import fake_accelerator as fake
import pytest
import torch
from torch import Tensor, nn

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME)
    LINES = torch.arange(6.0).view(2, 3)


def on_device(values: Tensor) -> Tensor:
    """The values there, arrived."""
    return values.to(DEVICE)


def begun(
    source: Tensor, stream: torch.Stream, *, waits: bool = True, records: bool = True
) -> tuple[Tensor, torch.Event]:
    """A non-blocking copy on a stream of its own, and the event after it; each duty can be forgotten."""
    if waits:
        stream.wait_event(torch.accelerator.current_stream(source.device).record_event())
    with stream:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)
    if records:
        source.record_stream(stream)
    return host, stream.record_event()


def is_poison(host: Tensor) -> bool:
    return bool((host.isnan() if host.is_floating_point() else host == -1).all())


class OrderOfStreams:
    def test_what_nobody_wrote_is_poison(self) -> None:
        assert is_poison(torch.empty(3, device=DEVICE).cpu())
        assert is_poison(torch.empty(3, device=DEVICE, dtype=torch.int64).cpu())

    def test_other_devices_keep_their_streams(self) -> None:
        assert type(torch.Event(device="cpu")) is not fake.Event
        assert isinstance(torch.Stream(device="cpu"), torch.Stream)
        with pytest.raises(ValueError, match="doesn't match the current accelerator"):
            torch.accelerator.current_stream("cpu")

    @pytest.mark.parametrize(
        "wait",
        [
            lambda side, main: side.wait_stream(main),
            lambda side, main: side.wait_event(main.record_event()),
            lambda side, main: main.record_event().wait(side),
            lambda side, main: main.record_event(torch.Event(device=DEVICE)).synchronize(),
            lambda side, main: main.synchronize(),
            lambda side, main: torch.accelerator.synchronize(),
        ],
    )
    def test_work_after_a_wait_reads_the_data(self, wait) -> None:
        source, side = on_device(LINES) + 1, torch.Stream(device=DEVICE)
        wait(side, torch.accelerator.current_stream(DEVICE))
        with side:
            assert torch.equal((source * 2).cpu(), (LINES + 1) * 2)

    def test_a_forgotten_wait_reads_poison_and_harms_nobody_else(self) -> None:
        source, side = on_device(LINES) + 1, torch.Stream(device=DEVICE)
        with side:
            assert is_poison((source * 2).cpu())
            assert is_poison(source.view(torch.int32).cpu())
        assert torch.equal(source.cpu(), LINES + 1)

    def test_an_event_of_before_the_work_is_no_wait_for_it(self) -> None:
        side, main = torch.Stream(device=DEVICE), torch.accelerator.current_stream(DEVICE)
        early = main.record_event()
        source = on_device(LINES).to(DEVICE, torch.float64)
        side.wait_event(early)
        host, event = begun(source, side, waits=False)
        event.synchronize()
        assert is_poison(host)

    def test_waits_are_handed_on_from_stream_to_stream(self) -> None:
        source, first, second = on_device(LINES) + 1, torch.Stream(device=DEVICE), torch.Stream(device=DEVICE)
        first.wait_stream(torch.accelerator.current_stream(DEVICE))
        second.wait_stream(first)
        with second:
            assert torch.equal(source.cpu(), LINES + 1)

    def test_writing_beside_a_write_spoils_it(self) -> None:
        source, side = on_device(LINES) + 1, torch.Stream(device=DEVICE)
        with side:
            source.add_(1)
        torch.accelerator.synchronize()
        assert is_poison(source.cpu())

    def test_a_stream_is_the_current_one_in_its_block_and_thread_alone(self) -> None:
        side = torch.Stream(device=DEVICE)
        with side, ThreadPoolExecutor() as pool:
            assert torch.accelerator.current_stream(DEVICE) == side
            assert pool.submit(torch.accelerator.current_stream, DEVICE).result().stream_id == 0
        assert torch.accelerator.current_stream().stream_id == 0


class CopiesToTheHost:
    @pytest.mark.parametrize(
        "wait",
        [
            lambda event, stream: event.synchronize(),
            lambda event, stream: stream.synchronize(),
            lambda event, stream: torch.accelerator.synchronize(),
            lambda event, stream: fake.finish(),
        ],
    )
    def test_the_buffer_is_poison_until_somebody_waits(self, wait) -> None:
        stream = torch.Stream(device=DEVICE)
        host, event = begun(on_device(LINES), stream)
        assert is_poison(host)
        assert not event.query()
        assert not stream.query()
        wait(event, stream)
        assert event.query()
        assert torch.equal(host, LINES)

    def test_an_event_of_before_the_copy_does_not_bring_it(self) -> None:
        stream, source = torch.Stream(device=DEVICE), on_device(LINES)
        early = stream.record_event()
        host, _ = begun(source, stream)
        early.synchronize()
        assert is_poison(host)

    def test_a_copy_by_to_is_begun_and_no_more(self) -> None:
        host = on_device(LINES.long()).to("cpu", non_blocking=True)
        assert is_poison(host)
        torch.accelerator.current_stream().synchronize()
        assert torch.equal(host, LINES.long())

    def test_an_inference_tensor_arrives_outside_of_the_mode(self) -> None:
        with torch.inference_mode():
            host, event = begun(on_device(LINES) + 1, torch.Stream(device=DEVICE))
        event.synchronize()
        assert torch.equal(host, LINES + 1)

    def test_a_source_that_is_freed_early_spoils_the_copy(self) -> None:
        source = on_device(LINES) + 1
        host, event = begun(source, torch.Stream(device=DEVICE), records=False)
        del source
        event.synchronize()
        assert is_poison(host)

    def test_what_is_made_of_a_freed_source_is_spoiled_with_it(self) -> None:
        source, side = on_device(LINES) + 1, torch.Stream(device=DEVICE)
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            host = (source * 2).to("cpu", non_blocking=True)
        del source
        side.synchronize()
        assert is_poison(host)

    def test_a_source_may_go_once_recorded_or_arrived_or_waited_for(self) -> None:
        main, side = torch.accelerator.current_stream(), torch.Stream(device=DEVICE)
        recorded, _ = begun(on_device(LINES) + 1, side)
        source = on_device(LINES) + 2
        kept, event = begun(source, side, records=False)
        event.synchronize()
        source = on_device(LINES) + 3
        waited, event = begun(source, side, records=False)
        main.wait_event(event)
        source = source[0]  # the view keeps all of the memory
        del source
        side.synchronize()
        for plus, host in enumerate((recorded, kept, waited), 1):
            assert torch.equal(host, LINES + plus)

    @pytest.mark.parametrize("waits", [False, True])
    def test_writing_to_a_source_before_it_is_copied_spoils_the_copy(self, waits) -> None:
        source = on_device(LINES)
        host, event = begun(source, torch.Stream(device=DEVICE))
        if waits:
            event.wait(torch.accelerator.current_stream())
        source.zero_()
        event.synchronize()
        assert torch.equal(host, LINES) if waits else is_poison(host)

    @pytest.mark.parametrize("waits", [False, True])
    def test_another_thread_must_wait_as_well(self, waits) -> None:
        host, event = begun(on_device(LINES), torch.Stream(device=DEVICE))
        seen: list[Tensor] = []

        def read() -> None:
            if waits:
                event.synchronize()
            seen.append(host.clone())

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert torch.equal(seen[0], LINES) if waits else is_poison(seen[0])

    def test_a_thread_waits_while_another_computes(self) -> None:
        layer, stream = nn.Linear(3, 3).to(DEVICE), torch.Stream(device=DEVICE)
        with torch.no_grad(), ThreadPoolExecutor(1) as pool, fake.recorded() as log:
            sources = [layer(on_device(LINES + step)) for step in range(50)]
            copies = [begun(source, stream) for source in sources]
            arrived = pool.map(lambda copy: (copy[1].synchronize(), copy[0])[1].clone(), copies)
            for host, source in zip(arrived, [layer(on_device(LINES + step)) for step in range(50)], strict=True):
                assert torch.equal(host, source.cpu())
        assert len(log.to_host) == 100


class TheLog:
    def test_copies_are_told_with_bytes_and_stream(self) -> None:
        stream = torch.Stream(device=DEVICE)
        with fake.recorded() as log:
            source = on_device(LINES)
            begun(source, stream)
            source.cpu()
        assert log.to_device == [(24, False, 0)]
        assert log.to_host == [(24, True, stream.stream_id), (24, False, 0)]
        assert (log.pinned_bytes, log.items, log.host_waits) == (24, 0, 2)
        assert "aten._copy_from.default" in log.ops

    def test_each_wait_of_the_host_counts_and_no_other(self) -> None:
        stream = torch.Stream(device=DEVICE)
        _, event = begun(on_device(LINES), stream)
        with fake.recorded() as log:
            event.query()
            stream.wait_event(event)
            fake.finish()
            assert log.host_waits == 0
            event.synchronize()
            stream.synchronize()
            torch.accelerator.synchronize()
            assert log.host_waits == 3
        event.synchronize()
        assert log.host_waits == 3


if fake.IN_CHILD:
    TestOrderOfStreams, TestCopiesToTheHost, TestTheLog = OrderOfStreams, CopiesToTheHost, TheLog
else:

    def test_the_fake_streams_in_a_process_of_their_own() -> None:
        assert fake.run_in_child(__file__) >= 25
