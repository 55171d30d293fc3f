"""A script that ends while something of ours is open: nothing is printed, nothing hangs, finished steps are stored."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from activation_extractor import open_store

PATIENCE_SECONDS = 60
BEGIN = """
    import sys

    import torch
    from activation_extractor import MemorySink, NpySink, SafetensorsSink, capture, extract, gradients, open_store
    from torch import nn

    model, folder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), sys.argv[1]

    def generate(**options):
        with capture(model, "*", **options) as acts:
            model(torch.ones(2, 4))
            yield acts
"""
OPEN = """
    store = extract(model, [torch.ones(2, 4)] * 9, "*", reduce="full", out=folder + "/a", progress=False)
    column, mapped, rows = store["0"], open_store(folder + "/a")["2"].mapped(), iter(store["1"].blocks(16))
    column[0], next(rows)
    blocks = [
        capture(model, "*", sink=SafetensorsSink(folder + "/b")),
        capture(model, "*", sink=NpySink(folder + "/c")),
        capture(model, ["*", gradients("*")], copy=False),
    ]
    entered = [block.__enter__() for block in blocks]
    model(torch.ones(2, 4))
    kept = [store, column, mapped, rows, blocks, entered, model]
"""
# Modules that are imported later, ours among them, are cleared before this one is.
GONE_AFTER_OUR_MODULES = """
    torch.kept, sys.kept = kept, [*sys.modules.values()]
    del store, column, mapped, rows, blocks, entered, model, kept
"""


def run(tmp_path, *parts):
    code = "\n".join(map(textwrap.dedent, parts))
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


@pytest.mark.parametrize("end", ["", GONE_AFTER_OUR_MODULES, "kept.append(kept)", "sys.exit(0)"])
def test_what_is_open_when_a_script_ends_is_let_go_of_without_a_word(tmp_path, end):
    ended = run(tmp_path, BEGIN, OPEN, end)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_generator_that_the_interpreter_closes_stores_whole_units_or_none(tmp_path):
    ended = run(
        tmp_path, BEGIN, 'acts = generate(sink=SafetensorsSink(folder + "/out", rows_per_unit=1))', "next(acts)"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    store = open_store(tmp_path / "out")
    assert store.rows in (0, 2)
    assert store.verify() == []
    ended = run(tmp_path, BEGIN, 'acts = generate(sink=folder + "/other")', "next(acts)")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_generator_that_the_interpreter_closes_needs_no_compiler(tmp_path):
    ended = run(tmp_path, "import torch._dynamo", BEGIN, "acts = generate()", "next(acts)")
    assert (ended.returncode, "activation_extractor" in ended.stderr) == (0, False)  # older releases of torch warn
