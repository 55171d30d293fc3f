"""Runs into the buckets of Google and Azure, into one in memory, and into one of moto: the bytes of a local run."""

from __future__ import annotations

import json

import pytest
from azure_server import AzureHandler
from s3_server import Handler, reached, serving
from small_runs import BATCHES, counted, files, interrupted, run, small_model

from activation_extractor import _storage, compare, open_store
from activation_extractor.errors import OtherRunError, StoreError

obstore = pytest.importorskip("obstore", reason="the extra 'remote' is not installed")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The folder of a run."""
    out = tmp_path_factory.mktemp("local") / "run"
    run(out)
    return out


def objects(url: str) -> dict[str, bytes]:
    """What lies below a URL, by obstore alone."""
    there, prefix = obstore.store.from_url(url[: url.index("/", 5)]), url[url.index("/", 5) + 1 :]
    keys = [one["path"] for one in obstore.list(there, prefix).collect()]
    return {key[len(prefix) + 1 :]: bytes(obstore.get(there, key).bytes()) for key in keys}


def check_run(url: str, local, found) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(url, interrupted(BATCHES, 4))
    assert open_store(url).ids == [f"row {row}" for row in range(12)]
    model, calls = counted(small_model())
    store = run(url, model=model)
    assert len(calls) < 5
    assert (store.verify(), store.ids) == ([], open_store(local).ids)
    assert compare(open_store(local), store).first_difference is None
    here, there = files(local), found()
    assert {name: data for name, data in here.items() if not name.startswith(("journal", "manifest"))}.items() <= (
        there.items()
    )
    assert json.loads(here["manifest.json"]).items() <= json.loads(there["manifest.json"]).items()
    with pytest.raises(OtherRunError, match="holds another run: it differs in reducers"):
        run(url, reduce="max")
    with pytest.raises(StoreError, match="got one that holds a store"):
        run(url, resume=False)
    assert found() == there


class OtherAzureHandler(AzureHandler):
    taken = 412, "ConditionNotMet"


KINDS = [("s3", Handler), ("gs", Handler), ("az", AzureHandler), ("az", OtherAzureHandler)]


@pytest.mark.parametrize(("scheme", "handler"), KINDS)
def test_a_run_into_a_bucket_of_each_kind(local, scheme, handler):
    with serving(handler) as (bucket, url), reached(url):
        bucket.page = 2
        start = "my run/ü"

        def found():
            return {key[len(start) + 1 :]: data for key, data in bucket.objects.items()}

        check_run(f"{scheme}://bucket/{start}", local, found)
        assert (bucket.replaced, len(bucket.objects)) == ([], 7)
        bucket.objects.clear()
        for fault in ("lost_answers", "broken_uploads", "unavailable"):
            setattr(bucket, fault, 1)
            run(f"{scheme}://bucket/{fault}")
            assert open_store(f"{scheme}://bucket/{fault}").ids == open_store(local).ids
        bucket.conditions = "ignored"
        with pytest.raises(StoreError, match="must refuse an object whose name is taken, got one that replaces it"):
            run(f"{scheme}://bucket/ignored")
        assert not any(key.startswith("ignored") for key in bucket.objects)


def test_a_run_into_memory(local):
    url = "memory://runs/my run"
    there = _storage.bucket_of("memory://runs")

    def found():
        keys = [one["path"] for one in obstore.list(there).collect()]
        return {key.removeprefix("my run/"): bytes(obstore.get(there, key).bytes()) for key in keys}

    check_run(url, local, found)


def test_a_run_into_a_bucket_of_moto(local, moto_bucket):
    check_run(f"{moto_bucket}/my run", local, lambda: objects(f"{moto_bucket}/my run"))
