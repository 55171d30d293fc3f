"""Stores in a bucket of moto, the S3 that others test with: what holds with our own server holds with theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from exports import make_store

from activation_extractor import compare, open_store
from activation_extractor.errors import StoreError

obstore = pytest.importorskip("obstore", reason="the extra 'remote' is not installed")


@pytest.fixture
def there(moto_bucket):
    return obstore.store.from_url(moto_bucket)


def create(there, key, data):
    """Whether there was no such object."""
    try:
        obstore.put(there, key, [data], mode="create", use_multipart=False)
    except obstore.exceptions.AlreadyExistsError:
        return False
    return True


def test_an_object_is_created_once_by_exactly_one_of_several_writers(there):
    jobs = [(key, writer) for key in range(10) for writer in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda job: create(there, f"a/{job[0]}", bytes([job[1]])), jobs))
    winners = [job for job, is_winner in zip(jobs, won, strict=True) if is_winner]
    assert [key for key, _ in winners] == list(range(10))
    assert all(bytes(obstore.get(there, f"a/{key}").bytes()) == bytes([writer]) for key, writer in winners)


def test_a_store_is_read_as_one_on_a_disk(tmp_path, moto_bucket, there):
    here = make_store(tmp_path)
    with pytest.raises(StoreError, match=r"must be a store, got no manifest.json there"):
        open_store(f"{moto_bucket}/my/store")
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            assert create(there, f"my/store/{path.relative_to(tmp_path / 'store').as_posix()}", path.read_bytes())
    store = open_store(f"{moto_bucket}/my/store")
    assert (store.ids, store.pairs, store.verify()) == (here.ids, here.pairs, [])
    assert compare(here, store).first_difference is None
    for key in here.pairs:
        for index in (slice(None), [2, 0, 0], -1, slice(1, 3)):
            mine, theirs = here[key][index], store[key][index]
            pairs = zip(mine, theirs, strict=True) if isinstance(mine, list) else [(mine, theirs)]
            assert all(torch.equal(one, other) for one, other in pairs), (key, index)
    obstore.delete(
        there, next(one["path"] for one in obstore.list(there).collect() if one["path"].endswith("safetensors"))
    )
    with pytest.raises(StoreError, match="must be a readable shard, got no such object"):
        store["h.0", "mean"][:]
