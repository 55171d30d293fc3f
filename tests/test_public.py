"""What must stay as it is for users: public names and signatures, and every byte of a store."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from public import IDS, LISTING, STORES, ScaledStack, batches, listing

from activation_extractor import SafetensorsSink, capture, extract, open_store
from activation_extractor.errors import OtherRunError

FORMATS = ["npy", "npz", "safetensors"]
LENGTHS = [1, 2, 3, 4, 1, 2]


def test_public_names_signatures_and_members_are_those_that_were_listed():
    # After a change that is meant: python tests/public.py
    assert listing() == json.loads(LISTING.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", sorted(STORES.glob("*/*")), ids=lambda folder: str(folder.relative_to(STORES)))
def test_a_store_of_the_first_release_is_read(folder):
    store = open_store(folder)
    assert list(store.ids) == [name for names in IDS for name in names]
    assert store.keep["length"].numpy().tolist() == LENGTHS
    rows = [row[:length] for batch in batches() for row, length in zip(batch["hidden"], batch["length"], strict=True)]
    for layer, factor in {"h.0": 2, "h.1": 6}.items():
        if folder.name == "block":
            np.testing.assert_array_equal(store[layer, "first"].numpy(), np.stack([row[0] * factor for row in rows]))
            np.testing.assert_array_equal(store[layer, "last"].numpy(), np.stack([row[-1] * factor for row in rows]))
            continue
        np.testing.assert_array_equal(store[layer, "mean"].numpy(), np.stack([row.mean(0) * factor for row in rows]))
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(store[layer, "full"][index], row * factor)
    assert store.verify() == []


@pytest.mark.parametrize("format_", FORMATS)
def test_a_run_of_the_first_release_goes_on_to_the_same_bytes(tmp_path, format_):
    there = STORES / format_ / "extract"
    out = shutil.copytree(there, tmp_path / "out")
    for shard in out.glob("shards/00000001.*"):
        shutil.rmtree(shard) if shard.is_dir() else shard.unlink()
    calls = []
    model = ScaledStack()
    model.register_forward_hook(lambda *arguments: calls.append(1))
    extract_again(model, out, format_)
    assert len(calls) in (1, 2)  # the missing unit, and one that is computed again to compare
    for path in filter(lambda path: path.is_file(), there.glob("shards/**/*")):
        assert (out / path.relative_to(there)).read_bytes() == path.read_bytes()


def test_another_run_is_refused_in_a_store_of_the_first_release(tmp_path):
    out = shutil.copytree(STORES / "safetensors/extract", tmp_path / "out")
    with pytest.raises(OtherRunError, match="weights"):
        model = ScaledStack()
        model.h[0].weight.data[0] = 5
        extract_again(model, out, "safetensors")


def test_a_block_goes_on_in_a_store_of_the_first_release(tmp_path):
    out = shutil.copytree(STORES / "safetensors/block", tmp_path / "out")
    model = ScaledStack()
    with capture(model, "h.*", reduce=["first", "last"], sink=SafetensorsSink(out, append=True)) as acts:
        batch = batches()[2]
        with acts.step(ids=["g"], keep={"length": batch.pop("length")}):
            model(batch["hidden"], batch["attention_mask"])
    assert list(open_store(out).ids) == ["a", "b", "c", "d", "e", "f", "g"]


def extract_again(model, out, format_):
    extract(
        model,
        batches(),
        ["h.0", "h.1"],
        reduce=["mean", "full"],
        out=out,
        format=format_,
        ids="id",
        keep=["length"],
        progress=False,
        rows_per_unit=2,
    )
