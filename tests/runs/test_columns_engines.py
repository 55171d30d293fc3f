"""`Columns` under Hugging Face `datasets`: in each of its formats, streamed, and in processes that it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from engine_models import rows_of

from activation_extractor.runs import Columns

TESTS = Path(__file__).parents[1]
NAMES = ["h.0:mean", "h.0:last", "h.1:mean", "h.1:last"]
SCRIPT = """
import sys
import torch, datasets
from engine_models import rows_of
from activation_extractor.runs import Columns

torch.set_num_threads(2)
columns = Columns("engine_models:small", "h.*", reduce="mean", keep="label")
columns(rows_of())
torch.randn(500, 500) @ torch.randn(500, 500)  # now OpenMP has threads, which a forked process lacks
rows = datasets.Dataset.from_dict({name: values.tolist() for name, values in rows_of(slice(0, 40)).items()})
out = rows.map(columns, batched=True, batch_size=7, num_proc=2)
print(len(out), out.column_names[-1])
"""


@pytest.fixture
def made():
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({name: values.tolist() for name, values in rows_of(slice(0, 40)).items()})
    return rows, Columns("engine_models:small", "h.*", reduce=["mean", "last"], keep="label")


def check(out, columns):
    """The same values and types as here; what was not returned stays beside them."""
    assert [feature.feature.dtype for feature in (out.features[name] for name in NAMES)] == ["float32"] * 4
    expected, rows = columns(rows_of(slice(0, 40))), out.with_format("numpy")[:]
    assert list(rows["id"]) == list(expected["id"])
    for name in NAMES:
        assert rows[name].dtype == np.float32
        np.testing.assert_allclose(rows[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [None, "numpy", "torch", "arrow", "pandas"])
def test_map_takes_columns_in_each_format_and_keeps_their_types(made, kind):
    rows, columns = made
    check(rows.with_format(kind).map(columns, batched=True, batch_size=8), columns)


def test_map_knows_what_it_has_computed_before(made):
    from datasets.fingerprint import Hasher

    _, columns = made
    digest = Hasher.hash(columns)
    columns(rows_of())
    assert Hasher.hash(columns) == digest
    assert Hasher.hash(Columns("engine_models:small", "h.*", reduce=["mean", "last"], keep="label")) == digest
    assert Hasher.hash(Columns("engine_models:small", "h.*", reduce="mean", keep="label")) != digest


def test_a_stream_is_mapped_as_it_comes(made):
    rows, columns = made
    first = next(iter(rows.to_iterable_dataset().map(columns, batched=True, batch_size=8)))
    np.testing.assert_allclose(first["h.1:last"], columns(rows_of())["h.1:last"][0], rtol=1e-5, atol=1e-6)


def test_processes_that_were_forked_after_a_forward_do_not_wait_for_threads_that_they_lack():
    environment = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, env=environment)
    assert done.stdout.split() == ["40", "h.1"], done.stderr
