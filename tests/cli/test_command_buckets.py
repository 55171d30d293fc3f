"""The command line on stores in buckets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import mistake, run

pytest.importorskip("obstore", reason="the extra 'remote' is not installed")

URL = "s3://bucket/my/run"
COMMAND = ["--model", "text_models:dna", "--input", "dna.fasta", "--layers", "encoder.layer.*"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dna.fasta").write_text(">s1\nACGTACGTNN\n>s2\nGGATACCA\n>s3\nACGT\n")


def test_a_run_into_a_bucket_is_that_into_a_folder_and_is_not_done_twice(here, bucket):
    said = run("extract", *COMMAND, "--out", URL)
    assert f"Store '{URL}' of 3 rows" in said.stdout
    assert f"open_store('{URL}')" in said.stdout
    run("extract", *COMMAND, "--out", "folder")
    shards = {key for key in bucket.objects if "/shards/" in key}
    assert {key: Path("folder", key.removeprefix("my/run/")).read_bytes() for key in shards} == {
        key: bucket.objects[key] for key in shards
    }
    before = dict(bucket.objects)
    assert "(3 from earlier)" in run("extract", *COMMAND, "--out", URL).stderr
    assert (bucket.objects, bucket.replaced) == (before, [])
    assert json.loads(run("extract", *COMMAND, "--out", f"{URL}2", "--json").stdout)["rows"] == 3


def test_stores_in_buckets_are_shown_verified_compared_exported_and_drawn(here, bucket):
    run("extract", *COMMAND, "--out", URL)
    run("extract", *COMMAND, "--out", "folder")
    assert "'s1', 's2', 's3'" in run("show", URL).stdout
    assert "All well" in run("verify", URL).stdout
    assert "no difference" in run("compare", URL, "folder").stdout
    assert "Wrote" in run("export", URL, "--to", "npz", "--out", "all.npz").stdout
    assert "Wrote" in run("plot", URL, "--out", "all.png").stdout
    key = next(key for key in bucket.objects if "/shards/" in key)
    bucket.objects[key] = bucket.objects[key][:-1] + bytes([bucket.objects[key][-1] ^ 1])
    assert f"s3://bucket/{key}" in run("verify", URL, code=1).stdout


def test_what_a_bucket_refuses_is_one_line(here, bucket):
    run("extract", *COMMAND, "--out", URL)
    before = dict(bucket.objects)
    assert "must be on a disk where --fresh is to begin another store" in mistake(
        "extract", *COMMAND, "--out", URL, "--fresh"
    )
    assert "must hold safetensors in a bucket, got shards of npz" in mistake(
        "extract", *COMMAND, "--out", f"{URL}2", "--format", "npz"
    )
    assert "holds another run" in run("extract", *COMMAND[:-1], "encoder.layer.1", "--out", URL, code=2).stderr
    bucket.denied = {"PUT"}
    said = run("extract", *COMMAND, "--out", f"{URL}2", code=2).stderr.splitlines()[-1]
    assert said.startswith(f"'{URL}2/shards/")
    assert "403 Forbidden" in said
    bucket.denied, bucket.conditions = set(), "ignored"
    said = run("extract", *COMMAND, "--out", f"{URL}2", code=2).stderr.splitlines()[-1]
    assert said.startswith(f"'{URL}2/shards' must refuse an object whose name is taken, got one that replaces it.")
    assert bucket.objects == before
