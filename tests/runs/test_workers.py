"""Iterable data sets that several workers read."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from activation_extractor import extract
from activation_extractor.errors import ArgumentError


class Rows(IterableDataset):
    """Some rows, which each worker gives, or its share of them."""

    def __init__(self, values, *, shares=False):
        self.values, self.shares = torch.tensor(values, dtype=torch.float32)[:, None], shares

    def __iter__(self):
        info = get_worker_info() if self.shares else None
        return iter(self.values) if info is None else islice(self.values, info.id, None, info.num_workers)


def share(worker):
    get_worker_info().dataset.values = get_worker_info().dataset.values[worker::2]


def stored(tmp_path, rows, **options):
    loader = DataLoader(rows, **{"num_workers": 2, "batch_size": 2, **options})
    return sorted(extract(nn.Identity(), loader, "", out=tmp_path, reduce="full", progress=False)[""].numpy()[:, 0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 5}, {"num_workers": 3}])
def test_rows_that_each_worker_gives_are_an_error_that_says_what_to_do(tmp_path, options):
    with pytest.raises(
        ArgumentError, match=r"batches must hold each row once, got .*, of which each of [23] workers gives all"
    ):
        stored(tmp_path, Rows([1, 2, 3, 4, 5]), **options)
    assert not any(tmp_path.glob("shards/*"))
    assert stored(tmp_path, Rows([1, 2, 3, 4, 5]), num_workers=0) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7], [1], [1, 1], [0, 0, 1, 1, 2, 2]])
def test_rows_that_are_shared_out_are_none(tmp_path, values, batch_size):
    if batch_size == 1 and values == [0, 0, 1, 1, 2, 2]:
        pytest.skip("each worker gives 0, 1, 2 here, which is what a data set of 0, 1, 2 gives that is not shared out")
    if batch_size > 1 and values == [0, 0, 1, 1, 2, 2]:
        values = [0, 0, 1, 2, 2, 2]
    assert stored(tmp_path, Rows(values, shares=True), batch_size=batch_size) == values


def test_a_worker_init_fn_may_share_them_out(tmp_path):
    assert stored(tmp_path, Rows([1, 2, 3, 4]), worker_init_fn=share) == [1, 2, 3, 4]


def test_one_worker_or_a_data_set_that_is_indexed_gives_each_row_once(tmp_path):
    assert stored(tmp_path / "one", Rows([1, 2, 3]), num_workers=1) == [1, 2, 3]
    rows = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    assert stored(tmp_path / "indexed", rows) == [1, 1, 2, 2]


def test_with_ids_the_repeated_id_is_the_error(tmp_path):
    class Named(Rows):
        def __iter__(self):
            return ({"input": value, "id": f"{number}"} for number, value in enumerate(super().__iter__()))

    loader = DataLoader(Named([1, 2, 3]), num_workers=2)
    with pytest.raises(Exception, match="twice|repeated|its own"):
        extract(nn.Identity(), loader, "", out=tmp_path, reduce="full", ids="id", progress=False)
