"""What the guide of store says of the format on disk is so, read with json, zlib, zipfile, numpy and safetensors."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from activation_extractor import NpySink, NpzSink, SafetensorsSink, capture, extract

PAGE = Path(__file__).parents[2] / "activation_extractor/store/README.md"
FORMATS = ("safetensors", "npz", "npy")


class Sometimes(nn.Module):
    """Its second layer runs in every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, more: bool) -> torch.Tensor:
        return self.sometimes(self.always(x)) if more else self.always(x)


@pytest.fixture(params=FORMATS)
def folder(request, tmp_path) -> Path:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batches = [
        {"x": torch.randn(2, 3, 4), "attention_mask": mask, "more": number % 2 == 1}
        | {"id": [f"a/{number}", f"é{number}"], "note": ["", "ü"], "odd:%name": [number, 2]}
        for number in range(5)
    ]
    options = {"ids": "id", "keep": ["note", "odd:%name"], "missing": "skip", "rows_per_unit": 4}
    out = tmp_path / "out"
    extract(Sometimes(), batches, "*", reduce=["full", "mean"], out=out, format=request.param, **options)
    return out


def crc32_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(", ", ": "), ensure_ascii=True)
    return f"{zlib.crc32(text.encode('ascii')):08x}"


def of_npy(data: bytes) -> tuple[np.ndarray, int]:
    return np.load(io.BytesIO(data)), zlib.crc32(data)


def read_shard(path: Path) -> tuple[dict[str, str], dict[str, tuple[np.ndarray, int]]]:
    """The metadata without checksums; by entry, the values and the checksum that the file says."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        crcs = {name.removeprefix("crc32:"): int(metadata.pop(name), 16) for name in [*metadata] if "crc32:" in name}
        assert crcs == {name: zlib.crc32(values.tobytes()) for name, values in entries.items()}
        return metadata, {name: (values, crcs[name]) for name, values in entries.items()}
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            found = {member.filename: (*of_npy(archive.read(member)), member) for member in archive.infolist()}
            assert all(name.endswith(".npy") and crc == member.CRC for name, (_, crc, member) in found.items())
            assert all(member.compress_type == zipfile.ZIP_STORED for _, _, member in found.values())
            entries = {name.removesuffix(".npy"): (values, crc) for name, (values, crc, _) in found.items()}
            return json.loads(archive.comment), entries
    about = json.loads((path / "about.json").read_text("utf-8"))
    entries = {}
    for number, (name, crc) in enumerate(about["crc32"].items()):
        readable = re.sub(r"[^A-Za-z0-9._+()-]", "_", name)[:100]
        entries[name] = of_npy((path / f"{number:04d}-{readable}.npy").read_bytes())
        assert entries[name][1] == crc
    assert len(list(path.iterdir())) == len(entries) + 1
    return about["about"], entries


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


def test_a_shard_says_what_it_is_and_its_seal_is_over_all_of_it(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert [path.stem for path in shards_of(folder)] == ["00000000", "00000001", "00000002"]
    for path, rows in zip(shards_of(folder), ["4", "4", "2"], strict=True):
        metadata, entries = read_shard(path)
        assert (metadata["unit"], metadata["rows"]) == (path.stem, rows)
        assert metadata["store"] == crc32_of_json(manifest["fingerprint"])
        assert re.fullmatch("[0-9a-f]{16} [0-9a-f]{8}", f"{metadata['inputs']} {metadata['first_batch']}")
        seal = metadata.pop("seal")
        listed = [[name, f"torch.{values.dtype}", [*values.shape], crc] for name, (values, crc) in entries.items()]
        assert seal == crc32_of_json([metadata, sorted(listed)])


def test_entries_have_the_names_dtypes_and_indices_of_the_page(folder):
    _, entries = read_shard(shards_of(folder)[0])
    values = {name: found for name, (found, _) in entries.items()}
    assert {*values} == {
        *("always:full", "always:full#offsets", "always:mean", "#ids", "#ids#offsets"),
        *("sometimes:full", "sometimes:full#offsets", "sometimes:full#rows", "sometimes:mean", "sometimes:mean#rows"),
        *("#keep:note", "#keep:note#offsets", "#keep:odd%3A%25name"),
    }
    assert all(values[name].dtype == np.int64 for name in values if name.endswith(("#offsets", "#rows")))
    assert values["always:full#offsets"].tolist() == [0, 3, 4, 7, 8]
    assert values["sometimes:full#offsets"].tolist() == [0, 3, 4]
    assert values["sometimes:full#rows"].tolist() == values["sometimes:mean#rows"].tolist() == [2, 3]
    assert values["#ids"].tobytes().decode() == "a/0é0a/1é1"
    assert values["#ids#offsets"].tolist() == [0, 3, 6, 9, 12]
    assert values["#keep:note"].tobytes().decode() == "üü"
    assert not any(name.startswith("sometimes") for name in read_shard(shards_of(folder)[2])[1])


def test_the_manifest_and_the_journal_have_the_members_of_the_page(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    tables = re.findall(r"^\| member .*?\n\n", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    members, of_columns = (
        {*re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE)))} for table in tables
    )
    assert {*manifest} == members
    column = of_columns - {"converted_from"}
    assert all({*described} == column for described in manifest["columns"])
    assert all({*described} == column - {"layer", "reducer"} | {"name"} for described in manifest["keep"])
    (journal,) = (folder / "journal").iterdir()
    assert re.fullmatch(r"\d{8}T\d{12}-[0-9a-f]{8}\.jsonl", journal.name)
    for line, path in zip(journal.read_text().splitlines(), shards_of(folder), strict=True):
        record, (metadata, _) = json.loads(line), read_shard(path)
        nbytes = sum(file.stat().st_size for file in ([*path.iterdir()] if path.is_dir() else [path]))
        assert [record[name] for name in ("unit", "rows", "bytes", "seal")] == [
            *(path.stem, int(metadata["rows"]), nbytes, metadata["seal"])
        ]


def test_values_begin_on_multiples_of_64_bytes(folder):
    path = shards_of(folder)[0]
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        header = json.loads(path.read_bytes()[8 : 8 + length])
        starts = {name: about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
        assert (8 + length) % 64 == 0
        assert all(starts[name] % values.itemsize == 0 for name, (values, _) in read_shard(path)[1].items())
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                header = path.read_bytes()[member.header_offset :][:30]
                name, extra = struct.unpack("<HH", header[26:])
                assert (member.header_offset + 30 + name + extra) % 64 == 0


@pytest.mark.parametrize(("sink", "dtype"), [(SafetensorsSink, "bfloat16"), (NpySink, "float32"), (NpzSink, "float32")])
def test_a_with_block_names_its_shards_by_its_writer_and_says_what_was_converted(sink, dtype, tmp_path):
    model = nn.Sequential(nn.Linear(4, 2)).bfloat16()
    with capture(model, "0", sink=sink(tmp_path / "out", rows_per_unit=2)):
        for _ in range(2):
            model(torch.zeros(2, 4, dtype=torch.bfloat16))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    (column,) = manifest["columns"]
    assert (column["dtype"], column.get("converted_from")) == (dtype, "bfloat16" if dtype == "float32" else None)
    assert (manifest["ids"], manifest["batches_per_unit"]) == (None, None)
    (journal,) = (tmp_path / "out/journal").iterdir()
    assert [path.stem for path in shards_of(tmp_path / "out")] == [f"{journal.stem}-{number:08d}" for number in (0, 1)]
