"""Values as they are read out of shards: every dtype and shape, in every format."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import SAFETENSORS, that_torch_has
from safetensors.torch import load_file

from activation_extractor import NpySink, NpzSink, SafetensorsSink, open_store
from activation_extractor._format._codecs import CODECS
from activation_extractor._format._manifest import store_name
from activation_extractor._format._reader import Reader, Values
from activation_extractor._format._stored_rows import Ragged
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.sinks import Step

SINKS = [SafetensorsSink, NpySink, NpzSink]
NUMPY_HAS = [
    *(torch.float64, torch.float32, torch.float16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
NUMPY_LACKS = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
STORE = store_name({})


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Four rows, with the largest finite value of the dtype and, where it has them, a negative zero and no number."""
    if dtype.is_complex:
        return torch.complex(torch.arange(12.0), -torch.arange(12.0)).reshape(4, 3).to(dtype)
    if not dtype.is_floating_point:
        values = np.arange(12).reshape(4, 3).astype(name_of(dtype))
        values[3, 0] = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        return torch.from_numpy(values)
    values = torch.arange(12.0).reshape(4, 3)
    values[0, 1:] = torch.tensor([-0.0, float("nan")])
    values = values.to(dtype)
    values[3, 0] = torch.finfo(dtype).max
    return values


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module", params=SINKS)
def dtypes(request):
    """A store with a column for each dtype."""
    with tempfile.TemporaryDirectory() as folder:
        sink = request.param(Path(folder) / "out")
        sink.write(Step(0, 4, {(name_of(dtype), "a"): sample(dtype) for dtype in NUMPY_HAS + NUMPY_LACKS}))
        sink.close()
        yield open_store(Path(folder) / "out")


def reads(column) -> list[torch.Tensor]:
    """The column in each way that gives all of it."""
    rows = [torch.stack([column[row] for row in range(4)]), torch.stack(list(column))]
    return [*rows, column[:], column[[0, 1, 2, 3]], column.torch(), torch.cat(column.mapped())]


@pytest.mark.parametrize("dtype", NUMPY_HAS, ids=name_of)
def test_a_dtype_that_numpy_has_comes_back_bit_for_bit_in_every_format(dtypes, dtype):
    column = dtypes[name_of(dtype)]
    assert column.dtype == dtype
    for read in reads(column):
        assert read.dtype == dtype
        assert as_bytes(read) == as_bytes(sample(dtype))
    for array in (column.numpy(), np.asarray(column), np.array(column, copy=False)):
        assert array.dtype == sample(dtype).numpy().dtype
        assert array.tobytes() == sample(dtype).numpy().tobytes()


@pytest.mark.parametrize("dtype", NUMPY_LACKS, ids=name_of)
def test_a_dtype_that_numpy_lacks_stays_in_safetensors_and_is_float32_in_numpy_formats(dtypes, dtype):
    column = dtypes[name_of(dtype)]
    on_disk = dtype if dtypes.manifest["codec"] == "safetensors" else torch.float32
    assert column.dtype == on_disk
    for read in reads(column):
        assert read.dtype == on_disk
        assert as_bytes(read) == as_bytes(sample(dtype).to(on_disk))
    assert column.numpy().dtype == np.float32
    assert column.numpy().tobytes() == sample(dtype).float().numpy().tobytes()


def test_what_is_read_is_what_the_formats_own_readers_find(dtypes):
    (shard,) = (dtypes.path / "shards").iterdir()
    if shard.suffix == ".safetensors":
        if SAFETENSORS < (0, 8):
            pytest.skip("this safetensors cannot read all of them")
        found = {name: as_bytes(value) for name, value in load_file(shard).items()}
    elif shard.is_dir():
        found = {path.name[5:-6] + ":a": np.load(path).tobytes() for path in shard.glob("*.npy")}
    else:
        with np.load(shard) as archive:
            found = {name: archive[name].tobytes() for name in archive.files}
    assert found == {f"{name}:a": as_bytes(dtypes[name][:]) for name in dtypes}


@pytest.mark.parametrize("make_sink", [NpySink, NpzSink])
def test_complex128_is_for_numpy_formats(tmp_path, make_sink):
    values = torch.complex(torch.arange(4.0), torch.ones(4)).to(torch.complex128)
    column = written(tmp_path, make_sink, values)["a"]
    assert column.dtype == torch.complex128
    assert torch.equal(column[:], values)
    assert torch.equal(column[2], values[2])


@pytest.mark.parametrize("dtype", that_torch_has("complex128", "float8_e8m0fnu"), ids=name_of)
def test_a_dtype_that_safetensors_lacks_is_an_error_that_says_what_to_use(tmp_path, dtype):
    text = r"must be one of float64, .*, got torch\.\w+\. Convert it in a reducer, or use NpySink or NpzSink"
    with pytest.raises(ArgumentError, match=text):
        written(tmp_path, SafetensorsSink, torch.ones(4).to(dtype))
    assert written(tmp_path / "npy", NpySink, torch.ones(4).to(dtype))["a"].shape == (4,)  # as the text advises


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_dtype_that_no_format_has_is_a_clear_error(tmp_path, make_sink):
    if (dtype := next(iter(that_torch_has("float4_e2m1fn_x2")), None)) is None:
        pytest.skip("this torch has no such dtype")
    with pytest.raises(ArgumentError, match=r"got torch\.float4_e2m1fn_x2"):
        written(tmp_path, make_sink, torch.ones(4, 2, dtype=torch.uint8).view(dtype))


def written(folder: Path, make_sink: type, *chunks: torch.Tensor | Ragged, ids=None):
    """A store of one shard."""
    sink = make_sink(folder / "out")
    start = 0
    for index, chunk in enumerate(chunks):
        rows = len(chunk.lengths) if isinstance(chunk, Ragged) else len(chunk)
        sink.write(Step(index, rows, {("a", "a"): chunk}, ids and ids[start : start + rows]))
        start += rows
    sink.close()
    return open_store(folder / "out")


@pytest.mark.parametrize("make_sink", SINKS)
@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 1), (4, 2, 0, 3), (4, 2, 3, 2), (1, 5)], ids=str)
def test_rows_of_any_shape_come_back_scalars_and_empty_ones_too(tmp_path, make_sink, shape):
    values = torch.randn(shape)
    column = written(tmp_path, make_sink, values)["a"]
    assert column.row_shape == shape[1:]
    assert column[-1].shape == shape[1:]
    for read in (column[:], column.mapped()[0], torch.stack(list(column)), column[list(range(len(values)))]):
        assert torch.equal(read, values)
    assert np.array_equal(np.array(column, copy=False), values.numpy())


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_step_without_rows_adds_none(tmp_path, make_sink):
    column = written(tmp_path, make_sink, torch.zeros(0, 3), torch.ones(2, 3), torch.zeros(0, 3))["a"]
    assert column.shape == (2, 3)
    assert torch.equal(column[:], torch.ones(2, 3))


@pytest.mark.parametrize("make_sink", SINKS)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 2, 0, 0, 1], [3, 0], [0]])
@pytest.mark.parametrize("features", [(), (0,), (2,)])
def test_sequences_without_positions_come_back(tmp_path, make_sink, lengths, features):
    values = torch.randn(sum(lengths), *features)
    column = written(tmp_path, make_sink, Ragged(values, torch.tensor(lengths)))["a"]
    expected = torch.split(values, lengths)
    for rows in (column[:], list(column), [column[row] for row in range(len(lengths))]):
        assert [row.shape for row in rows] == [row.shape for row in expected]
        assert all(map(torch.equal, rows, expected))
    assert column.lengths().tolist() == lengths
    assert torch.equal(column.flat(), values)
    assert torch.equal(column.mapped()[0], values)


@pytest.mark.parametrize("make_sink", SINKS)
@pytest.mark.parametrize("ids", [["", "ü", "日本 🙂", "a\nb"], [2**63 - 1, -(2**63), 0, -1]], ids=["text", "integers"])
def test_ids_come_back(tmp_path, make_sink, ids):
    store = written(tmp_path, make_sink, torch.ones(3, 2), torch.ones(1, 2), ids=ids)
    (shard,) = (store.path / "shards").iterdir()
    found = Reader(make_sink.codec, STORE).ids(str(shard))
    assert found == store.ids == ids
    assert [type(one) for one in found] == [type(one) for one in ids]


@pytest.mark.parametrize("make_sink", SINKS)
def test_a_shard_without_ids_has_none(tmp_path, make_sink):
    store = written(tmp_path, make_sink, torch.ones(3, 2))
    assert Reader(make_sink.codec, STORE).ids(str(next((store.path / "shards").iterdir()))) is None
    assert store.ids == [0, 1, 2]


def shard_of(folder: Path, codec: str, entries: dict[str, torch.Tensor], rows: int = 2, store: str = STORE) -> str:
    """A shard as it could not be written by a sink."""
    path = folder / ("00000000" + CODECS[codec].suffix)
    about = {"unit": "00000000", "rows": str(rows), "store": store}
    CODECS[codec].write(path, {name: [value] for name, value in entries.items()}, about)
    return str(path)


@pytest.fixture(params=list(CODECS))
def codec(request) -> str:
    return request.param


def test_values_give_rows_by_number_by_range_and_into_a_tensor(tmp_path, codec):
    expected = torch.randn(5, 3)
    path = shard_of(tmp_path, codec, {"a:a": expected}, rows=5)
    values = Reader(CODECS[codec], STORE).open(path, "a:a")
    assert isinstance(values, Values)
    assert values.row_bytes == 12
    assert torch.equal(values.row(4), expected[4])
    assert torch.equal(values.rows(1, 4), expected[1:4])
    assert values.rows(2, 2).shape == (0, 3)
    assert torch.equal(values.whole(), expected)
    assert torch.equal(values.mapped(), expected)
    out = torch.zeros(4, 3)
    values.read_into(out[1:3], 3)
    assert torch.equal(out, torch.cat([torch.zeros(1, 3), expected[3:], torch.zeros(1, 3)]))


def test_what_is_read_can_be_written_to_and_belongs_to_nobody_else(tmp_path, codec):
    path = shard_of(tmp_path, codec, {"a:a": torch.zeros(2, 3)})
    values = Reader(CODECS[codec], STORE).open(path, "a:a")
    for read in (lambda: values.row(0), lambda: values.rows(0, 2), values.whole, values.mapped):
        read().fill_(7)
    assert not values.whole().any()


def test_a_reader_can_be_pickled_and_opens_files_of_its_own(tmp_path, codec):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(2, 3)})
    reader = Reader(CODECS[codec], STORE)
    reader.open(path, "a:a").row(0)
    twin = pickle.loads(pickle.dumps(reader))
    assert torch.equal(twin.open(path, "a:a").whole(), torch.ones(2, 3))
    with pytest.raises(StoreError, match="must belong to this store"):
        pickle.loads(pickle.dumps(Reader(CODECS[codec], "another"))).shard(path)


def test_a_shard_of_another_store_is_refused(tmp_path, codec):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(2, 3)}, store="another")
    text = "00000000.*' must belong to this store, got a shard of another one. Take it out of the folder."
    with pytest.raises(StoreError, match=text):
        Reader(CODECS[codec], STORE).open(path, "a:a")


@pytest.mark.parametrize(
    ("offsets", "rows"),
    [
        ([0, 3, 2, 4], (0, None)),
        ([0, 3, 2, 4], (1, 2)),
        ([0, 1, 9, 4], (1, 2)),
        ([0, -5, 3, 4], (1, 2)),
        ([1, 2, 3, 4], (0, None)),
        ([0, 1, 2, 3], (0, None)),
        ([0, 1, 2, 3], (2, 3)),
    ],
    ids=str,
)
def test_offsets_that_do_not_rise_from_the_first_position_to_the_last_are_an_error(tmp_path, codec, offsets, rows):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(4, 2), "a:a#offsets": torch.tensor(offsets)}, rows=3)
    reader = Reader(CODECS[codec], STORE)
    with pytest.raises(StoreError, match="00000000.*' must hold rising offsets of 'a:a', got other numbers"):
        reader.offsets(path, "a:a", *rows)


def test_offsets_of_some_rows_are_theirs_alone(tmp_path, codec):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(6, 2), "a:a#offsets": torch.tensor([0, 1, 1, 6])}, rows=3)
    reader = Reader(CODECS[codec], STORE)
    assert reader.offsets(path, "a:a", 0, None).tolist() == [0, 1, 1, 6]
    assert reader.offsets(path, "a:a", 1, 3).tolist() == [1, 1, 6]
    assert reader.offsets(path, "a:a", 1, 2).tolist() == [1, 1]


@pytest.mark.parametrize(
    "ids",
    [
        {"#ids": torch.tensor([97, 255, 254], dtype=torch.uint8), "#ids#offsets": torch.tensor([0, 1, 3])},
        {"#ids": torch.tensor([97, 0, 98]), "#ids#offsets": torch.tensor([0, 1, 3])},
        {"#ids": torch.tensor([1.5, float("nan")])},
        {"#ids": torch.tensor([[1, 2], [3, 4]])},
    ],
    ids=["no_utf8", "wide_text", "floats", "pairs"],
)
def test_ids_that_are_neither_text_nor_integers_are_an_error(tmp_path, codec, ids):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(2, 3), **ids})
    with pytest.raises(StoreError, match=r"00000000.*' must .*\. Restore it from a copy"):
        Reader(CODECS[codec], STORE).ids(path)


def test_a_shard_that_is_gone_or_a_link_is_an_error(tmp_path, codec):
    path = shard_of(tmp_path, codec, {"a:a": torch.ones(2, 3)})
    moved = tmp_path / "moved"
    shutil.move(path, moved)
    with pytest.raises(StoreError, match="00000000.*' must be a readable shard, got No such file or directory"):
        Reader(CODECS[codec], STORE).shard(path)
    Path(path).symlink_to(moved)
    with pytest.raises(StoreError, match="00000000.*' must be a readable shard, got a link"):
        Reader(CODECS[codec], STORE).shard(path)
