"""Windows that are reduced, held and merged on an accelerator: a fake one, which hands out poison before it is done."""

from __future__ import annotations

import fake_accelerator as fake
import pytest
import torch
from long_rows import REDUCE, ROWS, by_hand, local_model, run_windows, window_batches

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME, 0)


class Windows:
    @pytest.mark.parametrize("reduce", [REDUCE, ["mean", "max"]], ids=["whole", "pooled"])
    def test_rows_are_what_they_are_on_the_cpu(self, tmp_path, reduce) -> None:
        expected = run_windows(tmp_path / "cpu", list(window_batches(ROWS, 10)), reduce=reduce)
        found = run_windows(tmp_path / "there", list(window_batches(ROWS, 10)), local_model().to(DEVICE), reduce=reduce)
        assert found.ids == expected.ids
        for key in expected:
            for row in range(len(ROWS)):
                torch.testing.assert_close(found[key][row], expected[key][row], atol=1e-6, rtol=1e-5)

    def test_the_forward_is_not_waited_for_where_rows_are_pooled(self, tmp_path) -> None:
        batches, model = list(window_batches(ROWS, 10)), local_model().to(DEVICE)
        with fake.recorded() as log:
            store = run_windows(tmp_path / "out", batches, model, reduce=["mean", "max"])
        assert log.items == len(list(model.parameters()))  # the digest of the weights
        assert all(waits_not for _, waits_not, _ in log.to_host)
        whole = by_hand(local_model(), "blocks.1", ROWS[2], 1000, 1)
        torch.testing.assert_close(store["blocks.1", "mean"][2], whole.mean(0), atol=1e-6, rtol=1e-5)


if fake.IN_CHILD:
    TestWindows = Windows
else:

    def test_windows_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 3
