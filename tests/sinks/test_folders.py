"""Folders that are something else, that vanish, and names that would lead out of theirs."""

from __future__ import annotations

import json
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors import safe_open
from wide_runs import ROWS, SINKS, batches, files, record, run, shards, wide_model

from activation_extractor import SafetensorsSink, capture, open_store
from activation_extractor.errors import StoreError


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("there", ["mine.txt", "shards/mine.txt", "journal/mine.jsonl", "shards", ".hidden"])
def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path, there, resume):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    asked = []
    text = "must be a new or empty folder, got one that holds something. Choose another folder"
    with pytest.raises(StoreError, match=text) as caught:
        run(tmp_path, data=(asked.append(1) or one for one in batches()), resume=resume)
    assert caught.value.path == tmp_path
    assert asked == []
    assert files(tmp_path) == {there: b"mine"}


def test_a_link_in_the_place_of_the_shards_is_refused_untouched(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="got one that holds something"):
        run(tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/out"])
def test_a_file_in_place_of_the_folder_is_an_error_and_stays(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be a folder.*, got Not a directory. Choose another folder"):
        run(tmp_path / where)
    with pytest.raises(StoreError, match="must be a folder.*, got Not a directory. Choose another folder"):
        record(tmp_path / where, [])
    assert files(tmp_path) == {"file": b"mine"}


def doing(act, at: int):
    """The batches, with something done before one of them is handed out."""
    for number, one in enumerate(batches()):
        if number == at:
            act()
        yield one


@pytest.mark.parametrize("at", [1, 10])
@pytest.mark.parametrize("kind", SINKS)
def test_a_folder_that_vanishes_in_mid_run_is_an_error(tmp_path, kind, at):
    out = tmp_path / "out"

    def vanish() -> None:
        while at == 10 and not any(out.glob("shards/0*")):
            time.sleep(0.001)
        out.rename(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match=r"out.*' must be .*got No such file or directory"):
        run(out, kind, doing(vanish, at))
    if at == 10:
        assert {damage.kind for damage in open_store(tmp_path / "elsewhere").verify()} <= {"unfinished"}


def test_what_the_disk_refused_is_told_at_the_next_step_not_only_at_the_next_unit(tmp_path):
    out, model = tmp_path / "out", wide_model()
    with pytest.raises(StoreError, match="got No such file or directory"):
        with capture(model, "0", sink=SafetensorsSink(out, rows_per_unit=16)):
            model(ROWS[:8])
            out.rename(tmp_path / "elsewhere")
            model(ROWS[:8])
            for thread in threading.enumerate():
                if thread.name == "activation_extractor writer":
                    thread.join()
            with pytest.raises(StoreError, match="got No such file or directory"):
                model(ROWS[:8])


def test_a_journal_that_cannot_be_written_is_an_error_and_its_shard_is_complete(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(tmp_path / "whole")
    with pytest.raises(StoreError, match=r"/journal.*' must be .*got File exists\.") as caught:
        run(out, data=doing((out / "journal").touch, 0))
    assert "journal" in str(caught.value.path)
    assert shards(out).items() < shards(tmp_path / "whole").items()
    assert open_store(out).rows >= 16
    (out / "journal").unlink()
    assert run(out).rows == 512
    assert shards(out) == shards(tmp_path / "whole")


NAMES = {
    "up": "../../outside",
    "up_alone": "..",
    "absolute": "/tmp/outside",
    "nul": "nul\0outside",
    "long": "x" * 300,
    "long_unicode": "日" * 300,
    "unicode": "ünïcödé 🙂\u202e",
    "empty": "",
    "space": " ",
    "windows": "C:\\outside",
    "percent": "%2E%2E%2Foutside",
    "draft": ".0123456789abcdef0123456789abcdef.tmp",
    "manifest": "manifest.json",
    "lines": "a\nb\r\tc",
}


def entries(shard: Path) -> list[str]:
    """The entries of a shard as its format's own reader tells."""
    if shard.is_dir():
        return list(json.loads((shard / "about.json").read_text())["crc32"])
    if shard.suffix == ".npz":
        return [name.removesuffix(".npy") for name in zipfile.ZipFile(shard).namelist()]
    with safe_open(shard, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", SINKS)
def test_a_hostile_name_or_id_comes_back_and_nothing_lands_outside_the_folder(stack, tokens, tmp_path, kind, name):
    parent = tmp_path / "a/b"
    parent.mkdir(parents=True)
    (parent / "mine").write_text("mine")
    before = files(tmp_path)
    selection, ids = {name: "h.0", name + "!": "h.1"}, [name, name + "!"]
    with capture(stack, selection, reduce={name or "_": "mean"}, sink=SINKS[kind](parent / "out")) as acts:
        with acts.step(ids=ids, keep={name or "_": torch.tensor([1, 2])}):
            stack(tokens)
    outside = {path: content for path, content in files(tmp_path).items() if not path.startswith("a/b/out/")}
    assert outside == before
    (shard,) = (parent / "out/shards").iterdir()
    names = entries(shard)
    assert not any(set(one) & set("/\\\0") for one in names)
    assert {unquote(one) for one in names if "#" not in one} == {f"{one}:{name or '_'}" for one in selection}
    store = open_store(parent / "out")
    assert (store.names, store.ids, list(store.keep)) == ([*selection], ids, [name or "_"])
    assert torch.equal(store[name].torch(), stack.h[0](stack.embed(tokens)).mean(1))
    assert store.row_of(name + "!") == 1
    assert store.verify() == []
