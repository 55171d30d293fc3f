"""What a shard's header tells, its seal, and the checks that every number goes through."""

from __future__ import annotations

import json
import os
import zlib

import pytest
import torch
from hostile import guarded

from activation_extractor._files import TruncatedError, open_regular, read_at
from activation_extractor._format._headers import (
    Extent,
    Header,
    bytes_of,
    check_apart,
    check_shape,
    crc32_of,
    seal,
    sealed,
    shape_of,
    unique,
)

ABOUT = {"unit": "00000000", "rows": "3", "store": "größe"}
LISTED = [("a", torch.float32, (3, 2), 1), ("b", torch.int64, (3,), 2)]


def contents(about: dict, listed: list) -> Header:
    extents = {name: Extent(None, 0, dtype, shape, crc, 0) for name, dtype, shape, crc in listed}
    return Header(about, extents)


# -- seals ------------------------------------------------------------------------------------------------------------


def test_a_seal_is_the_checksum_of_the_notes_and_of_each_entry():
    said = [ABOUT, [["a", "torch.float32", [3, 2], 1], ["b", "torch.int64", [3], 2]]]
    assert seal(ABOUT, LISTED) == f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"


def test_a_seal_does_not_depend_on_an_order_nor_on_a_seal_that_is_there():
    assert seal(dict(reversed(ABOUT.items())), LISTED[::-1]) == seal(ABOUT, LISTED)
    assert seal({**ABOUT, "seal": "00000000"}, LISTED) == seal(ABOUT, LISTED)


@pytest.mark.parametrize(
    ("about", "first"),
    [
        ({"unit": "00000001"}, LISTED[0]),
        ({"rows": "4"}, LISTED[0]),
        ({"more": ""}, LISTED[0]),
        ({}, ("A", torch.float32, (3, 2), 1)),
        ({}, ("a", torch.int32, (3, 2), 1)),
        ({}, ("a", torch.float32, (2, 3), 1)),
        ({}, ("a", torch.float32, (6,), 1)),
        ({}, ("a", torch.float32, (3, 2), 3)),
    ],
)
def test_whatever_is_changed_breaks_the_seal(about, first):
    good = {**ABOUT, "seal": seal(ABOUT, LISTED)}
    contents(good, LISTED).check_seal()
    with pytest.raises(ValueError, match="a header that does not match its seal"):
        contents({**good, **about}, [first, LISTED[1]]).check_seal()


@pytest.mark.parametrize("listed", [LISTED[:1], [*LISTED, ("c", torch.bool, (3,), 0)]], ids=["one_less", "one_more"])
def test_an_entry_that_is_lost_or_added_breaks_the_seal(listed):
    with pytest.raises(ValueError, match="does not match its seal"):
        contents({**ABOUT, "seal": seal(ABOUT, LISTED)}, listed).check_seal()


def test_notes_without_a_seal_are_refused():
    with pytest.raises(ValueError, match="does not match its seal"):
        contents(ABOUT, LISTED).check_seal()


def test_notes_are_sealed_over_the_whole_of_each_entrys_chunks():
    entries = {"a": [torch.zeros(1, 2), torch.zeros(2, 2)], "b": [torch.arange(3)]}
    assert sealed(ABOUT, entries, {"a": 1, "b": 2}) == {**ABOUT, "seal": seal(ABOUT, LISTED)}


# -- bytes and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(6)[::2],
        torch.arange(5.0).reshape(1, 5)[:, 0],
        torch.arange(6.0).reshape(2, 3)[:1, :1],
        torch.arange(3, dtype=torch.bfloat16),
        torch.tensor(2.0),
        torch.zeros(0, 3),
        torch.ones(2, requires_grad=True),
        torch.tensor([True, False]),
    ],
    ids=["turned", "strided", "one_of_a_row", "corner", "bf16", "scalar", "empty", "with_gradient", "bool"],
)
def test_bytes_are_those_of_the_values_in_row_major_order(tensor):
    values = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).tolist()
    assert list(bytes_of(tensor)) == values


def test_bytes_of_a_contiguous_tensor_are_its_own_memory():
    tensor = torch.zeros(2, dtype=torch.uint8)
    data = bytes_of(tensor)
    tensor[1] = 7
    assert list(data) == [0, 7]


@pytest.mark.parametrize("sizes", [[6], [1, 0, 5], [0], [2, 4]])
def test_a_checksum_goes_on_over_chunks(sizes):
    whole = torch.randn(sum(sizes), 3)
    data = whole.numpy().tobytes()
    assert crc32_of(whole.split(sizes)) == zlib.crc32(data)
    assert crc32_of(whole.split(sizes), start=5) == zlib.crc32(data, 5)


@pytest.mark.parametrize(("sizes", "rest"), [([2, 3], ()), ([0, 0], (4,)), ([1], (2, 0)), ([3, 1, 2], (2, 2))])
def test_the_shape_of_chunks_is_that_of_one_tensor(sizes, rest):
    assert shape_of([torch.zeros(size, *rest) for size in sizes]) == [sum(sizes), *rest]
    assert shape_of([torch.tensor(1.0)]) == []


@pytest.mark.parametrize(
    ("dtype", "shape", "row_bytes", "size"),
    [
        (torch.float32, (3, 2), 8, 24),
        (torch.bfloat16, (3,), 2, 6),
        (torch.complex128, (0, 4), 64, 0),
        (torch.bool, (2, 0, 5), 0, 0),
        (torch.int64, (2**62, 2**62), 2**65, 2**127),
    ],
)
def test_an_extent_knows_the_size_of_a_row_and_where_it_ends(dtype, shape, row_bytes, size):
    extent = Extent(None, 100, dtype, shape, 0, 90)
    assert extent.row_bytes == row_bytes
    assert extent.stop == 100 + size


@pytest.mark.parametrize("shape", [[], [0], [2**63 - 1, 3], (1, 2)])
def test_a_shape_of_sizes_is_one(shape):
    assert check_shape(shape) == tuple(shape)


@pytest.mark.parametrize(
    "shape", [[-1], [True], [1.0], ["1"], [None], [2**63], [2**70], [[1]], 3, None, "12", {"0": 1}]
)
def test_a_shape_of_anything_else_is_none(shape):
    with pytest.raises(ValueError, match="a shape that is not a list of sizes"):
        check_shape(shape)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_opened_and_read_at_any_place(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    descriptor = open_regular(tmp_path / "a")
    try:
        assert not os.get_inheritable(descriptor)
        assert read_at(descriptor, 3, 4) == b"3456"
        assert read_at(descriptor, 10, 0) == b""
        with pytest.raises(TruncatedError, match="a file that ends at byte 10 of 12"):
            read_at(descriptor, 8, 4)
        with pytest.raises(TruncatedError):
            read_at(descriptor, 50, 1)
    finally:
        os.close(descriptor)


def test_a_link_a_folder_and_a_pipe_are_refused_without_waiting(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else None
    for name in ("link", "dangling"):
        with pytest.raises(ValueError, match="a link"):
            open_regular(tmp_path / name)
    for path in (tmp_path, tmp_path / "pipe"):
        with guarded(), pytest.raises(ValueError, match="something else than a file"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")
    assert before is None or len(os.listdir("/proc/self/fd")) == len(before)  # nothing stays open


def test_a_name_must_not_come_twice_in_a_json_object():
    assert json.loads('{"a": 1, "b": {"a": 2}}', object_pairs_hook=unique) == {"a": 1, "b": {"a": 2}}
    for text in ('{"a": 1, "a": 1}', '{"b": {"a": 1, "\\u0061": 2}}'):
        with pytest.raises(ValueError, match="the name 'a' twice"):
            json.loads(text, object_pairs_hook=unique)


@pytest.mark.parametrize("spans", [[], [(0, 10)], [(5, 10), (0, 5)], [(3, 3), (3, 4), (3, 3)], [(0, 0)]])
def test_spans_that_lie_apart_are_fine(spans):
    check_apart(spans, 10)


@pytest.mark.parametrize("spans", [[(0, 5), (4, 6)], [(2, 3), (0, 9)], [(-1, 3)], [(5, 4)]])
def test_spans_that_overlap_or_run_backwards_are_refused(spans):
    with pytest.raises(ValueError, match="entries whose bytes overlap"):
        check_apart(spans, 10)


@pytest.mark.parametrize("spans", [[(0, 11)], [(0, 5), (10, 11)], [(2**64, 2**64 + 1)]])
def test_spans_beyond_the_end_are_refused(spans):
    with pytest.raises(TruncatedError, match="a file that ends at byte 10 of"):
        check_apart(spans, 10)
