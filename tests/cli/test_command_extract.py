"""``activation-extractor extract``, as a user types it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LETTERS, save_bert, tiny_bert, tiny_tokenizer
from transformers import AutoModel

from activation_extractor import blocks, capture, extract, length_batches, open_store

TEXTS = ["".join(LETTERS[(row * step) % 20] for step in range(1 + row * 7 % 23)) for row in range(40)]

FACTORIES = """
import torch
from torch import nn

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    def forward(self, rows):
        for stage in self.stages:
            rows = stage(rows)
        return rows

def rows():
    torch.manual_seed(0)
    return Rows()

def images():
    from numpy import asarray
    return rows(), lambda images: torch.stack([torch.tensor(asarray(one)).float().mean((0, 1)) for one in images])

class Packed(nn.Module):
    def forward(self, rows):
        return torch.zeros(len(rows), 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)

def packed():
    return nn.Sequential(Packed())

class Broken(nn.Module):
    def forward(self, rows):
        raise RuntimeError("must not run")

def broken():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Broken())

calls = 0

def interrupted():
    import os, signal
    model = rows()
    def count(module, arguments):
        global calls
        calls += 1
        if calls == 6 and os.path.exists("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
    model.register_forward_pre_hook(count)
    return model
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("factories.py").write_text(FACTORIES)
    Path("x.txt").write_text("\n".join(TEXTS))
    np.save("x.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    np.save("wide.npy", np.zeros((3, 7), dtype=np.float32))
    yield tmp_path
    sys.modules.pop("factories", None)


run, mistake = partial(commands.run, "extract"), partial(commands.mistake, "extract")


def test_the_store_equals_that_of_the_python_interface_byte_for_byte(here, bert):
    run("--model", bert, "--input", "x.txt", "--max-tokens", 60, "--reduce", "mean", "--reduce", "last", "--out", "out")
    model, tokenizer = AutoModel.from_pretrained(bert), tiny_tokenizer()
    lengths = [len(tokens) for tokens in tokenizer(TEXTS).input_ids]
    batches = [
        {**tokenizer([TEXTS[row] for row in rows], padding=True, return_tensors="pt"), "row": rows}
        for rows in length_batches(lengths, max_tokens=60)
    ]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask", "row")} for batch in batches]
    options = {"order": "row", "rows_per_unit": 1024, "progress": False}
    extract(model, batches, blocks(model), reduce=["mean", "last"], out="api", **options)
    shards = [path.name for path in Path("api/shards").iterdir()]
    assert [path.name for path in Path("out/shards").iterdir()] == shards
    for name in shards:
        assert Path("out/shards", name).read_bytes() == Path("api/shards", name).read_bytes()


def test_rows_stand_in_the_order_of_the_input(here, bert):
    run(
        "--model",
        bert,
        "--input",
        "x.txt",
        "--batch-size",
        7,
        "--rows-per-unit",
        16,
        "--layers",
        "*.layer.1",
        "--out",
        "out",
    )
    store = open_store("out")
    model, tokenizer = tiny_bert(), tiny_tokenizer()
    for row in (0, 5, 39):
        with torch.no_grad(), capture(model, "encoder.layer.1", reduce="mean") as acts:
            model(**tokenizer([TEXTS[row]], return_tensors="pt"))
        torch.testing.assert_close(store["encoder.layer.1"][row], acts["encoder.layer.1"][0], atol=1e-5, rtol=1e-5)
    assert len(list(Path("out/shards").iterdir())) == 3


def test_it_says_before_what_it_will_do_and_afterwards_what_it_did(here, bert):
    done = run("--model", bert, "--input", "x.txt", "--out", "out")
    assert (
        "Capturing 3 layers, 'encoder.layer.0' to 'encoder.layer.2' (mean) for 40 rows: about 7.5 KiB." in done.stderr
    )
    assert "Store 'out' of 40 rows: 3 tensors" in done.stdout
    told = done.stdout[done.stdout.index("Read it back:") :].splitlines()[1:4]
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in told), names)
    assert names["store"].rows == 40


@pytest.mark.parametrize(("codec", "dtype"), [("safetensors", "bfloat16"), ("npz", "bfloat16"), ("npy", "float32")])
@pytest.mark.parametrize("reduce", ["mean", "full"])
def test_the_bytes_foretold_are_those_written(here, bert, codec, dtype, reduce):
    options = ["--format", codec, "--dtype", dtype, "--reduce", reduce]
    done = run("--model", bert, "--input", "x.txt", "--out", "out", *options)
    store = open_store("out")
    columns = [store[layer] for layer in store]
    written = sum((column.flat() if column.is_ragged else column[:]).nbytes for column in columns)
    foretold = done.stderr.partition("about ")[2].partition(" KiB")[0]
    assert float(foretold) == pytest.approx(written / 1024, abs=0.06)


def test_the_summary_is_json_for_a_script(here, bert):
    done = run("--model", bert, "--input", "x.txt", "--layers", "encoder.layer.0", "--json", "--out", "out")
    summary = json.loads(done.stdout)
    column = {"layer": "encoder.layer.0", "reducer": "mean", "shape": [40, 16], "dtype": "float32"}
    assert summary == {"path": "out", "rows": 40, "bytes": summary["bytes"], "columns": [column]}


def test_special_tokens_are_left_out_when_asked_for(here, bert):
    Path("x.fasta").write_text(">p1 first\nACD\nEF\n>p2\nM\n")
    options = ["--skip-special-tokens", "--keep", "description", "--reduce", "full", "--layers", "encoder.layer.2"]
    run("--model", bert, "--input", "x.fasta", "--out", "out", *options)
    store = open_store("out")
    assert store.ids == ["p1", "p2"]
    assert list(store.keep["description"]) == ["first", ""]
    assert store["encoder.layer.2"].lengths().tolist() == [5, 1]


def test_lines_come_from_a_pipe(here, bert):
    run("--model", bert, "--input", "-", "--out", "out", typed="ACD\nEF\n")
    assert open_store("out").rows == 2


def test_arrays_and_images_go_through_models_of_ones_own(here):
    run("--model", "factories:rows", "--input", "x.npy", "--layers", "stages.*", "--reduce", "full", "--out", "arrays")
    assert open_store("arrays")["stages.1"].shape == (20, 3)
    for row in range(3):
        Path("images").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (row, 2 * row, 3 * row)).save(f"images/{row}.png")
    run("--model", "factories:images", "--input", "images", "--out", "out", "--batch-size", 2, "--reduce", "full")
    store = open_store("out")
    assert store.ids == ["0.png", "1.png", "2.png"]
    assert store["stages.1"].shape == (3, 3)


def test_what_comes_behind_the_last_layer_wanted_may_be_left_out(here):
    command = ["--model", "factories:broken", "--input", "x.npy", "--layers", "1", "--reduce", "full", "--out", "out"]
    assert "got 'RuntimeError: must not run'" in mistake(*command)
    run(*command, "--stop-early")
    assert open_store("out")["1"].shape == (20, 3)


def test_the_same_command_goes_on_and_another_one_is_refused(here, bert):
    command = ["--model", bert, "--input", "x.txt", "--rows-per-unit", 16, "--out", "out"]
    run(*command)
    lost = Path("out/shards/00000001.safetensors")
    before = lost.read_bytes()
    lost.unlink()
    assert "40 rows (24 from earlier)" in run(*command).stderr
    assert lost.read_bytes() == before
    *_, line = run(*command, "--reduce", "max", code=2).stderr.splitlines()
    assert line.startswith("'out' holds another run: it differs in reducers")
    *_, line = run(*command, "--format", "npz", code=2).stderr.splitlines()
    assert line.endswith("Use the --format that it was begun with.")
    assert lost.read_bytes() == before


def test_a_fresh_run_begins_a_store_and_renames_the_earlier_one(here, bert):
    command = ["--model", bert, "--input", "x.txt", "--layers", "encoder.layer.0", "--out", "out"]
    run(*command, "--fresh")
    before = {path: path.read_bytes() for path in sorted(Path("out").rglob("*")) if path.is_file()}
    done = run(*command, "--fresh", "--reduce", "max")
    assert "The earlier store is in 'out.1' now.\n" in done.stderr
    assert open_store("out").pairs == [("encoder.layer.0", "max")]
    for path, content in before.items():
        assert Path("out.1", *path.parts[1:]).read_bytes() == content
    run(*command, "--fresh")
    assert open_store("out.2").pairs == [("encoder.layer.0", "max")]
    assert "40 rows (40 from earlier)" in run(*command).stderr


def test_a_fresh_run_renames_nothing_where_it_fails_or_finds_files_of_others(here, bert):
    command = ["--model", bert, "--input", "x.txt", "--out", "out"]
    run(*command)
    mistake(*command, "--fresh", "--layers", "nowhere")
    mistake(*command, "--fresh", "--input", "nowhere.txt")
    assert mistake(*command, "--fresh", "--append") == "--append must be left out with --fresh, got True."
    Path("out/notes.txt").write_text("mine")
    assert "must hold nothing but a store where --fresh is to begin another, got 'notes.txt'" in mistake(
        *command, "--fresh"
    ).replace('"', "")
    Path("out/notes.txt").rename("out/shards/notes.txt")
    assert "shards/notes.txt" in mistake(*command, "--fresh")
    Path("out/shards/notes.txt").unlink()
    assert open_store("out").rows == 40
    assert not Path("out.1").exists()


def test_a_fresh_run_through_a_link_stays_on_its_disk_and_never_in_the_current_folder(here, bert, monkeypatch):
    Path("disk").mkdir()
    Path("out").symlink_to("disk/store")
    command = ["--model", bert, "--input", str(here / "x.txt"), "--layers", "encoder.layer.0"]
    run(*command, "--out", "disk/store")
    run(*command, "--out", "out", "--fresh")
    assert open_store("disk/store").rows == open_store("disk/store.1").rows == 40
    monkeypatch.chdir("disk/store")
    assert "must not be the current folder" in mistake(*command, "--out", ".", "--fresh")
    assert "40 from earlier" in run(*command, "--out", ".").stderr


def test_ctrl_c_before_the_first_unit_says_that_nothing_is_stored(here):
    Path("interrupt").touch()
    command = ["--model", "factories:interrupted", "--input", "x.npy", "--batch-size", 2, "--reduce", "full"]
    done = run(*command, "--out", "out", code=130)
    told = "Stopped. Nothing is stored: the first 20 rows were not complete. With smaller units, such as"
    assert done.stderr.endswith(f"{told} --rows-per-unit 2, less is lost.\n")


def test_a_run_goes_on_with_the_units_that_its_store_has(here, bert):
    command = ["--model", bert, "--input", "x.txt", "--layers", "encoder.layer.0", "--out", "out"]
    run(*command, "--rows-per-unit", 16)
    assert "40 rows (40 from earlier)" in run(*command).stderr


def test_ctrl_c_keeps_finished_units_and_the_same_command_goes_on(here):
    command = ["--model", "factories:interrupted", "--input", "x.npy", "--batch-size", 2, "--rows-per-unit", 4]
    command += ["--reduce", "full"]
    Path("interrupt").touch()
    done = run(*command, "--out", "out", code=130)
    assert done.stderr.endswith("Stopped. 8 rows are in 'out'; the same command goes on from there.\n")
    Path("interrupt").unlink()
    run(*command, "--out", "out")
    run(*command, "--out", "whole")
    names = sorted(path.name for path in Path("whole/shards").iterdir())
    assert [Path("out/shards", name).read_bytes() for name in names] == [
        Path("whole/shards", name).read_bytes() for name in names
    ]


def test_a_disk_without_room_is_refused_before_anything_runs(here, bert, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    *_, line = run("--model", bert, "--input", "x.txt", "--out", "out", code=2).stderr.splitlines()
    assert line.startswith("'out' must have room for 7.5 KiB, got 4.9 KiB free. Make room, choose another disk")
    assert not Path("out").exists()


def test_what_is_there_needs_no_room_again(here, bert, monkeypatch):
    command = ["--model", bert, "--input", "x.txt", "--out", "out"]
    run(*command)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    run(*command)


@pytest.mark.parametrize("codec", ["safetensors", "npz", "npy"])
def test_a_dtype_that_the_format_lacks_is_refused_before_anything_is_written(here, codec):
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("torch.float4_e2m1fn_x2 is newer")
    options = ["--layers", "0", "--reduce", "full", "--format", codec]
    said = mistake("--model", "factories:packed", "--input", "x.npy", "--out", "out", *options)
    assert "got torch.float4_e2m1fn_x2. Convert it in a reducer" in said
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--input", "nowhere.txt"], r"--input must be an existing file or folder, got 'nowhere\.txt'\."),
        (["--layers", "encoder.layr.*"], r"No layer matches 'encoder\.layr\.\*'\. Close matches:"),
        (["--reduce", "median"], r"--reduce must be one of full, mean"),
        (["--text-column", "body"], r"--text-column must name a column of 'x\.txt', got 'body'\."),
        (["--id-column", "id"], r"--id-column must name a column of 'x\.txt', got 'id'\."),
        (["--max-length", "100"], r"--max-length must be from 1 to the 64 tokens that the model takes, got 100\."),
        (["--dtype", "float12"], r"--dtype must be one of"),
        (["--out", "factories.py"], r"'factories\.py' must be a folder"),
        (["--out", "."], r"'\.' must be a new or empty folder, got one that holds something\."),
        (
            ["--model", "factories:rows", "--input", "wide.npy"],
            r"the model must run on rows of the input",
        ),
        (["--model", "./nowhere"], r"--model must be a folder with a config\.json"),
        (["--model", "factories:nothing"], r"--model must name something that 'factories' holds"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(here, bert, options, text):
    before = sorted(path.name for path in here.iterdir())
    assert re.match(text, mistake("--model", bert, "--input", "x.txt", "--out", "out", *options))
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == before


def test_a_model_may_import_modules_of_the_current_directory_when_it_runs_and_no_longer_afterwards(here):
    Path("later.py").write_text("def twice(rows): return 2 * rows\n")
    Path("factories.py").write_text(
        "from torch import nn\nclass Late(nn.Module):\n    def forward(self, rows):\n"
        "        from later import twice\n        return twice(rows)\ndef late(): return nn.Sequential(Late())\n"
    )
    before = list(sys.path)
    run("--model", "factories:late", "--input", "x.npy", "--layers", "0", "--reduce", "full", "--out", "out")
    assert open_store("out")["0"][1].tolist() == [6, 8, 10]
    assert sys.path == before
    sys.modules.pop("later")


def test_ranks_share_a_run_and_the_first_one_speaks(tmp_path, bert, monkeypatch):
    options = ["--model", bert, "--input", tmp_path / "texts.txt", "--rows-per-unit", 8]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    commands.run("extract", *options, "--out", tmp_path / "one")
    with pytest.warns(UserWarning, match="Each of the 2 ranks"):
        done = commands.run("extract", *options, "--out", tmp_path / "two", "--share", "1/2")
    assert (done.stdout, done.stderr.replace("\n", "")) == ("", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="Each of the 2 ranks"):
        assert "40 rows" in commands.run("extract", *options, "--out", tmp_path / "two").stdout
    for path in (tmp_path / "one/shards").iterdir():
        assert (tmp_path / "two/shards" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("share", ["2", "2/2", "a/b", "0/"])
def test_a_share_that_is_none_is_a_mistake(tmp_path, share):
    assert "share must be" in commands.mistake(
        "extract", "--model", "m", "--input", "i", "--out", tmp_path, "--share", share
    )


def test_ranks_do_not_begin_stores_of_their_own(tmp_path):
    text = commands.mistake("extract", "--model", "m", "--input", "i", "--out", tmp_path, "--share", "0/2", "--fresh")
    assert "fresh must be left out where processes share the work, got '0/2'" in text


def test_a_store_in_a_bucket_is_written_shown_verified_and_gone_on_with(bucket, here):
    pytest.importorskip("obstore", reason="the extra 'remote' is not installed")
    options = ["--model", "factories:rows", "--input", "x.npy", "--layers", "stages.*", "--reduce", "full"]
    url, files = "s3://bucket/run", sorted(path.name for path in here.iterdir())
    assert f"open_store('{url}')" in run(*options, "--out", url).stdout
    assert open_store(url).rows == 20
    puts = bucket.count("PUT")
    run(*options, "--out", url)
    assert bucket.count("PUT") == puts
    assert url in commands.run("show", url).stdout
    commands.run("verify", url)
    assert "be on a disk where --fresh" in mistake(*options, "--out", url, "--fresh")
    assert "must hold safetensors in a bucket" in mistake(*options, "--out", "s3://bucket/b", "--format", "npz")
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == files
