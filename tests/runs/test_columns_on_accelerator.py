"""`Columns` on an accelerator: a fake one, which hands out poison before it is done."""

from __future__ import annotations

import fake_accelerator as fake
import numpy as np
import torch
from engine_models import rows_of

from activation_extractor.runs import Columns

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME, 0)


class Batches:
    def test_columns_are_what_they_are_on_the_cpu_and_have_arrived(self) -> None:
        for reduce in (["mean", "last"], ["full"]):
            options = {"reduce": reduce, "keep": "label"}
            expected = Columns("engine_models:small", "h.*", **options)(rows_of())
            columns = Columns("engine_models:small", "h.*", device=DEVICE, **options)
            for _ in range(3):
                found = columns(rows_of())
                assert list(found) == list(expected)
                for name in list(expected)[2:]:
                    for row, other in zip(found[name], expected[name], strict=True):
                        np.testing.assert_allclose(row, other, atol=1e-6, rtol=1e-5)

    def test_the_results_of_a_batch_travel_in_one_copy(self) -> None:
        columns = Columns("engine_models:small", "h.*", reduce=["mean", "last"], device=DEVICE, keep="label")
        columns(rows_of())
        with fake.recorded() as log:
            columns(rows_of())
        assert len([1 for _, waits_not, _ in log.to_host if waits_not]) == 1


if fake.IN_CHILD:
    TestBatches = Batches
else:

    def test_columns_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) >= 2
