"""``verify``: one line when all is well, else what is damaged and exit code 1."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from commands import mistake, run
from stores import mean_step

from activation_extractor import NpySink, SafetensorsSink
from activation_extractor._display import human_bytes
from activation_extractor.cli import main


def make_store(folder: Path, make_sink: type = SafetensorsSink, units: int = 2) -> Path:
    sink = make_sink(folder / "out", rows_per_unit=2)
    for index in range(units):
        sink.write(mean_step(2, [f"{index}a", f"{index}b"], float(index)))
    sink.close()
    return folder / "out"


def files(out: Path) -> list[Path]:
    return sorted(path for path in (out / "shards").rglob("*") if path.is_file())


@pytest.mark.parametrize("make_sink", [SafetensorsSink, NpySink])
def test_a_whole_store_is_one_line_with_what_was_read(tmp_path, make_sink):
    out = make_store(tmp_path, make_sink)
    nbytes = sum(path.stat().st_size for path in files(out))
    assert run("verify", out).stdout == f"All well: 2 units, {human_bytes(nbytes)} read\n"
    assert json.loads(run("verify", out, "--json").stdout) == {
        "path": str(out),
        "units": 2,
        "bytes": nbytes,
        "damages": [],
    }


def test_every_damage_is_a_line_and_the_exit_code_is_1(tmp_path):
    out = make_store(tmp_path, units=3)
    first, second, _ = files(out)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    os.truncate(second, second.stat().st_size - 4)
    (out / "mine.txt").touch()
    lines = run("verify", out, code=1).stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{out / 'mine.txt'}: foreign, ")
    assert lines[1].startswith(f"{first}: altered, ")
    assert lines[2].startswith(f"{second}: truncated, ")
    assert lines[3].startswith("3 damages: 3 units, ")


def test_damages_in_json_have_path_kind_and_detail(tmp_path):
    out = make_store(tmp_path, units=1)
    (out / "mine.txt").touch()
    done = run("verify", out, "--json", code=1)
    detail = "not written by this library"
    assert json.loads(done.stdout)["damages"] == [{"path": str(out / "mine.txt"), "kind": "foreign", "detail": detail}]


def test_a_link_among_the_shards_is_a_damage_and_no_crash(tmp_path):
    out = make_store(tmp_path, units=1)
    (shard,) = files(out)
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    done = run("verify", out, code=1)
    assert f"{shard}: foreign" in done.stdout
    assert "0 units" in done.stdout


def test_a_file_name_cannot_add_a_line(tmp_path):
    out = make_store(tmp_path, units=1)
    (out / "x\nAll well\x1b[2J").touch()
    done = run("verify", out, code=1)
    assert len(done.stdout.splitlines()) == 2
    assert "\x1b" not in done.stdout


def test_a_folder_that_is_no_store_is_an_error(tmp_path):
    assert "must be a store, got no such folder" in mistake("verify", tmp_path / "not")


def test_the_exit_codes_reach_the_shell(tmp_path, monkeypatch, capsys):
    out = make_store(tmp_path, units=1)
    for folder, code, told in ((out, 0, "All well"), (out, 1, "foreign"), (tmp_path / "not", 2, "")):
        if code == 1:
            (out / "mine.txt").touch()
        monkeypatch.setattr(sys, "argv", ["activation-extractor", "verify", str(folder)])
        with pytest.raises(SystemExit) as exited:
            main()
        assert exited.value.code == code
        said = capsys.readouterr()
        assert told in said.out
        assert ("must be a store" in said.err) is (code == 2)
