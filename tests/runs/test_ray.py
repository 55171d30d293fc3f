"""`Columns` under Ray Data, on a cluster of this machine with real processes, of which some are killed."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import engine_models
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ray = pytest.importorskip("ray", reason="ray comes with the extra of that name")

from engine_models import UNIT_OPTIONS, rows_of  # noqa: E402
from engine_ray import cluster, kill, wait_until  # noqa: E402
from small_runs import batch, shards, small_model  # noqa: E402

from activation_extractor import Columns, extract, open_store, plan_units  # noqa: E402

OPTIONS = {"reduce": ["mean", "last"], "keep": "label"}
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray Data warns of itself


@pytest.fixture(scope="module")
def working(tmp_path_factory):
    """A cluster whose workers leave a file named after their process for each batch."""
    folder = tmp_path_factory.mktemp("batches")
    with cluster(**{engine_models.SEEN: str(folder)}):
        yield folder


def data_set():
    """40 rows in 10 blocks."""
    rows = rows_of(slice(0, 40))
    return ray.data.from_items([{name: rows[name][row] for name in rows} for row in range(40)], override_num_blocks=10)


@contextmanager
def killing_one(folder):
    """A process is killed while it works, once three batches were begun; yields what gives the process of each."""
    before = set(folder.iterdir())

    def batches() -> list[int]:
        files = sorted(set(folder.iterdir()) - before, key=lambda file: file.name.rpartition("-")[2])
        names = [file.name.partition("-")[0] for file in files]
        return [int(name) for name in names if name.isdigit()]

    def kill_one():
        kill(wait_until(lambda: len(found := batches()) >= 3 and found, "three batches were begun")[-1])

    thread = threading.Thread(target=kill_one)
    thread.start()
    yield batches
    thread.join()


def check_rows(folder, model):
    """Each row once, with the values that the model gives in this process, and the types of the columns."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    numbers = [int(row_id.removeprefix("row ")) for row_id in table["id"].to_pylist()]
    assert sorted(numbers) == list(range(40))
    assert table["label"].to_pylist() == numbers
    rows = Columns(model, "h.*", **OPTIONS)(rows_of(slice(0, 40)))
    names = [f"{layer}:{reducer}" for layer in ("h.0", "h.1") for reducer in ("mean", "last")]
    assert table.column_names == ["id", "label", *names]
    for name in names:
        assert table.schema.field(name).type == pa.fixed_shape_tensor(pa.float32(), (8,))
        values = table[name].combine_chunks().to_numpy_ndarray()
        np.testing.assert_allclose(values, rows[name][numbers], rtol=1e-5, atol=1e-6)


def test_two_actors_of_which_one_is_killed_while_it_works_give_each_row_once(working, tmp_path):
    columns = data_set().map_batches(
        Columns,
        fn_constructor_args=("engine_models:small", "h.*"),
        fn_constructor_kwargs={**OPTIONS, "prepare": "engine_models:slowly", "to": "arrow"},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    with killing_one(working) as batches:
        columns.write_parquet(str(tmp_path / "out"))
    assert len({*batches()}) == 3  # the two, and the one that took the place of the one that was killed
    check_rows(tmp_path / "out", "engine_models:small")


def test_tasks_that_are_sent_the_same_columns_build_the_model_once_in_each_process(working, tmp_path):
    before = set(working.iterdir())
    columns = Columns("engine_models:in_bfloat16", "h.*", **OPTIONS)
    out = data_set().map_batches(columns, batch_size=4, batch_format="pyarrow")
    out.write_parquet(str(tmp_path / "out"))
    check_rows(tmp_path / "out", "engine_models:in_bfloat16")
    builds = [file.name.split("-")[1] for file in set(working.iterdir()) - before if file.name.startswith("built")]
    assert builds
    assert len({*builds}) == len(builds)


def test_one_task_a_unit_of_which_each_comes_twice_and_one_is_killed_gives_the_store_of_one_process(working, tmp_path):
    rows = [batch(slice(start, start + 4)) for start in range(0, 40, 4)]
    task = ray.remote(max_retries=3)(engine_models.write_slowly)
    units = plan_units(rows, rows_per_unit=8, ids="id")
    with killing_one(working) as batches:
        receipts = ray.get([task.remote(unit, str(tmp_path / "units")) for unit in units for _ in range(2)])
    assert len(batches()) >= 2 * len(units) + 1
    assert sum(receipt.rows for receipt in receipts) == 80
    extract(small_model(), rows, "h.*", out=tmp_path / "one", rows_per_unit=8, progress=False, **UNIT_OPTIONS)
    written = {name: data for name, data in shards(tmp_path / "units").items() if not name.endswith(".tmp")}
    assert written == shards(tmp_path / "one")  # beside the draft of the one that was killed
    assert open_store(tmp_path / "units").is_complete
    assert plan_units(rows, out=tmp_path / "units", ids="id") == []


def test_what_is_wrong_on_a_worker_is_said_as_it_is_here(working):
    rows = data_set()
    for options, text in [
        ({"model": "engine_models:smal"}, "ArgumentError: model must name something that 'engine_models' holds"),
        ({"model": "engine_models:broken"}, "It raised FileNotFoundError: no weights at /models/large."),
        ({"ids": "key"}, "ArgumentError: the columns of ids= must hold 'key', got ['id', 'input_ids',"),
    ]:
        columns = Columns(**{"model": "engine_models:small", "layers": "h.*", **OPTIONS} | options)
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            rows.map_batches(columns, batch_size=4).materialize()
        assert text in str(caught.value)
