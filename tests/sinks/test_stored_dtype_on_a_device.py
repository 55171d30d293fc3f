"""`dtype=` on an accelerator: what is stored is rounded there, and nobody waits for the check that it fits."""

from __future__ import annotations

from pathlib import Path

import fake_accelerator as fake
import pytest
import torch
from models import BlockStack

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import StoredDtypeError

if fake.IN_CHILD:
    fake.install()
    DEVICE = torch.device(fake.NAME, 0)

TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([6, 1, 3, 4])[:, None]).long()


def run(folder: Path, device: torch.device, reduce: list[str], scale: float = 1.0) -> fake.Log:
    torch.manual_seed(1)
    model = BlockStack().eval().to(device)
    model.h[2].register_forward_hook(lambda module, args, output: output * scale)
    sink = SafetensorsSink(folder, dtype=torch.float16)
    tokens, mask = TOKENS.to(device), MASK.to(device)
    with torch.inference_mode(), capture(model, "h.*", reduce=reduce, sink=sink):
        with fake.recorded() as log:
            model(tokens, mask)
    return log


class Stored:
    """Stored halves."""

    def test_pooled_halves_are_copied_in_one_piece_and_never_waited_for(self, tmp_path: Path) -> None:
        reduce = ["mean", "last"]
        run(tmp_path / "cpu", torch.device("cpu"), reduce)
        log = run(tmp_path / "there", DEVICE, reduce)
        assert (log.items, log.host_waits) == (0, 0)
        verdicts = (1 + 4 * len(reduce)) * 3 * 8  # of the mask, and of each column
        assert [nbytes for nbytes, *_ in log.to_host] == [4 * len(reduce) * 4 * 8 * 2 + verdicts]
        found, expected = open_store(tmp_path / "there"), open_store(tmp_path / "cpu")
        for key in expected:
            assert found[key].dtype == torch.float16
            assert torch.allclose(found[key].torch(), expected[key].torch(), atol=1e-3)

    @pytest.mark.parametrize("reducer", ["mean", "full"])
    def test_a_value_that_overflows_is_found_when_it_arrives_and_nothing_is_written(
        self, tmp_path: Path, reducer: str
    ) -> None:
        with pytest.raises(StoredDtypeError, match=rf"'h.2' with '{reducer}' must fit float16, .* in row 0") as caught:
            run(tmp_path / "there", DEVICE, [reducer], scale=1e8)
        assert caught.value.__notes__ == ["found when the values of step 0 had arrived on the CPU"]
        assert list((tmp_path / "there" / "shards").iterdir()) == []


if fake.IN_CHILD:
    TestStored = Stored
else:

    def test_dtypes_in_a_process_with_a_fake_accelerator() -> None:
        assert fake.run_in_child(__file__) == 3
