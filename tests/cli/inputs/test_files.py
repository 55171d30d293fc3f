"""Files that are packed, encoded in some way, or come through a pipe."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
import zipfile

import pytest
from sources import read

from activation_extractor.cli.inputs import _files, open_source
from activation_extractor.errors import ArgumentError

FASTA = ">a|1 first\nMPTI\nKQL\n>b\nMK*\n"
CONTENTS = {
    "x.txt": ("MPTIKQL\nMK\n", None),
    "x.jsonl": ('{"text": "MPTIKQL", "id": "a|1"}\n{"text": "MK", "id": "b"}\n', "id"),
    "x.json": ('[{"text": "MPTIKQL", "id": "a|1"}, {"text": "MK", "id": "b"}]', "id"),
    "x.csv": ("id,text\na|1,MPTIKQL\nb,MK\n", "id"),
    "x.tsv": ("id\ttext\na|1\tMPTIKQL\nb\tMK\n", "id"),
    "x.fa": (FASTA, None),
    "x.fq": ("@a|1 first\nMPTIKQL\n+\nIIIIIII\n@b\nMK\n+\nII\n", None),
}


def zstd(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.compress(data)


PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


class Pipe(io.StringIO):
    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("packing", [*PACKED, "GZ"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_text_may_be_packed_in_each_way(tmp_path, name, packing):
    content, id_column = CONTENTS[name]
    path = tmp_path / f"{name}.{packing}"
    path.write_bytes(PACKED[packing.lower()](content.encode()))
    rows = read(path, id_column=id_column)
    assert rows.values == ["MPTIKQL", "MK"]
    assert rows.ids == (None if name == "x.txt" else ["a|1", "b"])


@pytest.mark.parametrize("packing", PACKED)
def test_what_was_packed_in_several_parts_is_read_whole(tmp_path, packing):
    pack = PACKED[packing]
    (tmp_path / f"x.txt.{packing}").write_bytes(pack(b"a\nb") + pack(b"c\n") + pack(b"d\n"))
    assert read(tmp_path / f"x.txt.{packing}").values == ["a", "bc", "d"]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_packed_file_that_is_damaged_is_one_sentence(tmp_path, packing, damage):
    data = bytearray(PACKED[packing](os.urandom(3000).hex().encode()))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 :: 2] = bytes(len(data[len(data) // 2 :: 2]))
    (tmp_path / f"x.txt.{packing}").write_bytes(data)
    with pytest.raises(ArgumentError, match=r"input must be a file that can be read, got '.*x\.txt\..*'\. [A-Z]"):
        read(tmp_path / f"x.txt.{packing}")


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "-"])
def test_archives_and_what_office_programs_save_are_told(tmp_path, monkeypatch, name):
    with zipfile.ZipFile(tmp_path / "x.csv", "w") as archive:
        archive.writestr("y.csv", "text\na\n")
    (tmp_path / "x.txt").write_bytes((tmp_path / "x.csv").read_bytes())
    monkeypatch.setattr("sys.stdin", Pipe((tmp_path / "x.csv").read_bytes()))
    with pytest.raises(ArgumentError, match=r"input must be text, or packed as .* It is a zip archive: unpack it"):
        read(name if name == "-" else tmp_path / name)


def test_what_is_packed_is_seen_by_its_bytes_and_not_by_its_name(tmp_path):
    (tmp_path / "x.txt").write_bytes(gzip.compress(b"a\nb"))
    (tmp_path / "y.txt.gz").write_bytes(b"a\nb")
    assert read(tmp_path / "x.txt").values == read(tmp_path / "y.txt.gz").values == ["a", "b"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv", "x.tsv", "x.fa"])
@pytest.mark.parametrize(
    ("encoding", "option"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-8-sig", "utf-8"),
        ("utf-8-sig", "latin-1"),
        ("utf-16", None),
        ("utf-32", None),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("latin-1", "latin-1"),
        ("cp1252", "cp1252"),
        ("shift-jis", "shift-jis"),
    ],
)
def test_a_byte_order_mark_or_an_option_says_the_encoding(tmp_path, name, encoding, option):
    content, id_column = CONTENTS[name]
    letters = "日本" if encoding == "shift-jis" else "Größe"
    content = content.replace("MPTI\nKQL", letters).replace("MPTIKQL", letters)
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read(tmp_path / name, id_column=id_column, encoding=option).values == [letters, "MK"]


def test_another_encoding_is_told_with_its_line_and_so_is_one_that_nobody_knows(tmp_path):
    (tmp_path / "x.txt").write_bytes("Größe".encode("latin-1"))
    text = r"the text of line 1 must be text .* behind 2 characters'\. Say what it is in: input_encoding='latin-1'"
    with pytest.raises(ArgumentError, match=text):
        read(tmp_path / "x.txt")
    with pytest.raises(ArgumentError, match=r"input_encoding must be an encoding that Python knows, got 'klingon'\."):
        read(tmp_path / "x.txt", encoding="klingon")
    (tmp_path / "x.txt").write_bytes("Größe".encode("utf-16-le"))
    with pytest.raises(ArgumentError, match=r"input must be text in UTF-8, .* say input_encoding='utf-16-le'"):
        read(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes("Größe".encode("utf-16")[:-1])
    with pytest.raises(ArgumentError, match=r"input must be text in UTF-8, got .*truncated data"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize("packing", [None, *PACKED])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.fa", "x.fq"])
def test_what_comes_through_a_pipe_is_read_as_a_file_of_the_same_bytes(tmp_path, monkeypatch, name, packing, mark):
    content = mark * (name != "x.fq") + CONTENTS[name][0].encode()
    (tmp_path / name).write_bytes(PACKED[packing](content) if packing else content)
    monkeypatch.setattr("sys.stdin", Pipe((tmp_path / name).read_bytes()))
    piped, of_file = read("-", id_column=CONTENTS[name][1]), read(tmp_path / name, id_column=CONTENTS[name][1])
    assert piped[:4] == of_file[:4]
    assert piped.values == ["MPTIKQL", "MK"]
    kinds = {"x.jsonl": "jsonl", "x.json": "json", "x.fa": "fasta", "x.fq": "fastq"}
    note = f"Standard input is read as {kinds.get(name)}; --input-format text reads its lines."
    assert list(piped.notes) == ([note] if name in kinds else [])


@pytest.mark.parametrize(
    "content", ["> a quotation\n> of a mail\n", "@somebody hello\nyes\n", "[MASK] is a token\n", "{curly}\n", "{\n"]
)
def test_lines_that_only_begin_like_something_else_are_lines(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", Pipe(content.encode()))
    assert read("-").values == content.splitlines()


@pytest.mark.parametrize("content", [b"id,text\n7,a\n", b'"id";"text"\n7;a\n', b"id\ttext\n7\ta\n"])
@pytest.mark.parametrize("named", [{"text_column": "text"}, {"id_column": "id"}, {"keep": ["text"]}])
def test_a_table_through_a_pipe_is_told_by_the_columns_that_are_wanted(monkeypatch, content, named):
    monkeypatch.setattr("sys.stdin", Pipe(content))
    rows = read("-", **named)
    assert (rows.values, list(rows.notes)) == (
        ["a"],
        ["Standard input is read as csv; --input-format text reads its lines."],
    )


def test_lines_are_lines_where_no_column_is_named_or_their_first_line_lacks_it(monkeypatch):
    for content, named in [(b"id,text\n7,a\n", {}), (b"a text, or two\nb\n", {"text_column": "text"})]:
        monkeypatch.setattr("sys.stdin", Pipe(content))
        assert read("-", **named).values == content.decode().splitlines()


def test_an_option_says_what_comes_through_a_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", Pipe(b"id,text\n7,a\n"))
    assert read("-", format="csv", id_column="id").ids == ["7"]
    monkeypatch.setattr("sys.stdin", Pipe(FASTA.encode()))
    assert read("-", format="text").values == FASTA.splitlines()
    monkeypatch.setattr("sys.stdin", Pipe(b"id,text\n7,a\n"))
    with pytest.raises(ArgumentError, match=r"id_column must name a column of 'standard input', got 'name'\. .*csv"):
        read("-", id_column="name")
    monkeypatch.setattr("sys.stdin", Pipe(b""))
    with pytest.raises(ArgumentError, match="input must hold at least one row, got 'standard input'"):
        read("-")


def test_a_parquet_file_and_an_array_come_through_a_pipe(tmp_path, monkeypatch):
    numpy = pytest.importorskip("numpy")
    pa = pytest.importorskip("pyarrow", reason="reads and writes .parquet")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    monkeypatch.setattr("sys.stdin", Pipe((tmp_path / "x.parquet").read_bytes()))
    assert read("-").values == ["a", "b"]
    numpy.save(tmp_path / "x.npy", numpy.arange(3.0))
    monkeypatch.setattr("sys.stdin", Pipe((tmp_path / "x.npy").read_bytes()))
    assert read("-").values == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are Unix's")
def test_a_named_pipe_is_read_as_standard_input_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(FASTA))
    writer.start()
    assert read(tmp_path / "pipe").ids == ["a|1", "b"]
    writer.join()


def test_the_copy_of_a_pipe_is_removed_with_what_reads_it(monkeypatch):
    monkeypatch.setattr("sys.stdin", Pipe(b"a\n"))
    file = _files.piped("-", None)
    path = file.path
    assert path.read_text() == "a\n"
    del file
    assert not path.exists()


def test_a_format_may_be_said_for_a_file_whose_name_does_not_say_it(tmp_path):
    (tmp_path / "proteins.out").write_text(FASTA)
    with pytest.raises(ArgumentError, match=r"input must be .*, got '.*proteins\.out'\. Say input_format=text"):
        read(tmp_path / "proteins.out")
    assert read(tmp_path / "proteins.out", format="fasta").ids == ["a|1", "b"]
    with pytest.raises(ArgumentError, match=r"input_format must be one of text, jsonl, .*, got 'fatsa'\."):
        read(tmp_path / "proteins.out", format="fatsa")


def test_lines_of_a_text_file_that_look_like_fasta_are_read_as_lines_and_that_is_told(tmp_path):
    (tmp_path / "x.txt").write_text(FASTA)
    rows = read(tmp_path / "x.txt")
    assert rows.values == FASTA.splitlines()
    assert "looks like fasta" in rows.notes[0]
    (tmp_path / "x.txt").write_text(json.dumps({"text": "a"}))
    assert "looks like jsonl" in read(tmp_path / "x.txt").notes[0]


def test_a_pipe_that_cannot_be_copied_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ArgumentError, match=r"input must be a pipe that can be read, got 'standard input'\. .* closed"):
        read("-")
    monkeypatch.setattr("sys.stdin", Pipe(b"a"))
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArgumentError, match=r"No space left on device\. It is copied to '.*', or where TMPDIR says\."):
        read("-")


def test_a_file_that_changes_while_it_is_read_is_one_sentence(tmp_path):
    (tmp_path / "x.csv").write_text("text,n\na,1\n")
    source = open_source(str(tmp_path / "x.csv"), keep=["n"])
    (tmp_path / "x.csv").write_text("text,n\na,1\nb,x\n")
    with pytest.raises(
        ArgumentError, match=r"input must stay as it is while it is read, got '.*x\.csv'\. Run it again"
    ):
        list(source)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text("text\na\n")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ArgumentError, match=r"input must be a file that can be read, got '.*x\.csv'\. .*Permission"):
        read(tmp_path / "x.csv")


def test_no_name_is_no_input():
    with pytest.raises(ArgumentError, match=r"input must be an existing file or folder, got ''\."):
        read("")
