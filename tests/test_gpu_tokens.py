"""Batches of a store on an accelerator, whichever torch knows; see `test_gpu` for where and when they run."""

from __future__ import annotations

from pathlib import Path

import fake_accelerator as fake
import pytest
import torch
from token_stores import IDS, KEY, LENGTHS, MEAN, numbers, token_store

if fake.IN_CHILD:
    fake.install()


class Batches:
    """They travel from pinned memory beside what the training does."""

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_batches_are_there_and_what_they_are_on_the_cpu(
        self, accelerator: torch.device, tmp_path: Path, shuffle: bool
    ) -> None:
        store = token_store(tmp_path)
        options = {
            "batch_size": 7,
            "beside": [IDS],
            "keep": ["label", "text"],
            "rows": True,
            "shuffle": shuffle,
            "epochs": 2,
        }
        found, expected = list(store.tokens(KEY, device=accelerator, **options)), list(store.tokens(KEY, **options))
        assert len(found) == len(expected) == 12
        for batch, other in zip(found, expected, strict=True):
            assert batch[-1] == other[-1]
            for value, wanted in zip(batch[:-1], other[:-1], strict=True):
                assert value.device == accelerator
                torch.testing.assert_close(value.cpu(), wanted)

    def test_copies_are_out_of_pinned_memory_and_nothing_waits_for_them(
        self, accelerator: torch.device, tmp_path: Path
    ) -> None:
        if accelerator.type != fake.NAME:
            pytest.skip("the fake device alone counts copies")
        store = token_store(tmp_path)
        with fake.recorded() as log:
            list(store.tokens(KEY, batch_size=10, epochs=1, device=accelerator))
        assert [(nbytes, non_blocking) for nbytes, non_blocking, _ in log.to_device] == [(80, True)] * 4
        assert all(stream for *_, stream in log.to_device)  # one of its own
        assert log.pinned_bytes >= 4 * 80
        assert log.host_waits == 0

    def test_each_token_comes_once(self, accelerator: torch.device, tmp_path: Path) -> None:
        tokens = token_store(tmp_path).tokens(KEY, batch_size=10, drop_last=False, epochs=1, device=accelerator)
        assert sorted(number for batch in tokens for number in numbers(batch.cpu())) == list(range(sum(LENGTHS)))

    def test_statistics_are_those_of_the_cpu(self, accelerator: torch.device, tmp_path: Path) -> None:
        store = token_store(tmp_path)
        found, expected = (
            store.batches(MEAN, batch_size=5, statistics=True, device=device) for device in (accelerator, None)
        )
        next(found), next(expected)
        assert torch.equal(found.statistics.mean, expected.statistics.mean)

    def test_it_goes_on_bit_equal(self, accelerator: torch.device, tmp_path: Path) -> None:
        store = token_store(tmp_path)
        tokens, again = (store.tokens(KEY, batch_size=4, device=device) for device in (accelerator, None))
        next(tokens), next(tokens)
        again.load_state_dict(tokens.state_dict())  # made on one device, and loaded for another one
        torch.testing.assert_close(next(tokens).cpu(), next(again))


if fake.IN_CHILD or torch.accelerator.is_available():
    TestBatches = pytest.mark.gpu(Batches)
else:

    @pytest.mark.gpu
    def test_on_an_accelerator(accelerator: torch.device) -> None:
        """Stands for all of the above where there is none, so that one skip, or one failure, says so."""


if not fake.IN_CHILD:

    def test_all_of_it_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 6
