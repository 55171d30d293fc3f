"""Files and folders that appear whole or not at all, and never in place of another."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from pathlib import Path

import pytest

from activation_extractor import _files
from activation_extractor._files import draft, is_draft, make_folders, publish, replacing, sweep, sync_folder
from activation_extractor.errors import StoreError

OLD = "." + "0" * 32 + ".tmp"


def refusing(code: int):
    """A function of `os` that a file system does not have."""

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# -- replacing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_old", [True, False])
def test_a_new_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path, has_old):
    path = tmp_path / "a.bin"
    if has_old:
        path.write_bytes(b"old")
    before = path.stat().st_ino if has_old else None
    with replacing(path) as file:
        file.write(b"new")
        assert path.exists() == has_old
    assert path.stat().st_ino != before  # who reads the old one reads on
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("body"), KeyboardInterrupt()])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_block_that_raises_leaves_the_old_file_and_no_other(tmp_path, error, has_old):
    path = tmp_path / "a.txt"
    if has_old:
        path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"half of the new")
        raise error
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([b"old"] if has_old else [])


def test_a_disk_that_refuses_half_way_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(_files.os, "fsync", refusing(errno.ENOSPC))
    text = r"a\.safetensors' must be writable, got No space left on device\. Check the folder"
    with pytest.raises(StoreError, match=text), replacing(path) as file:
        file.write(b"new")
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "missing" / "a.bin"
    text = r"a\.bin' must be writable, got No such file or directory\."
    with pytest.raises(StoreError, match=text) as caught, replacing(path):
        pass
    assert caught.value.path == path
    assert isinstance(caught.value, OSError)
    assert not path.parent.exists()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="must be writable, got Not a directory"), replacing(tmp_path / "file" / "a"):
        pass


# -- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "long" * 60])
def test_a_draft_lies_beside_its_goal_until_the_block_ends(tmp_path, name):
    path = tmp_path / name
    with draft(path) as beside:
        assert not beside.exists()
        beside.write_bytes(b"x")
        assert beside.parent == tmp_path
        assert is_draft(beside.name)
        with draft(path) as another:
            assert another != beside
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_is_a_folder_is_removed_with_what_it_holds(tmp_path):
    with pytest.raises(KeyboardInterrupt), draft(tmp_path / "a") as beside:
        (beside / "deep").mkdir(parents=True)
        (beside / "deep" / "file").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_became_a_link_is_removed_and_what_it_points_to_stays(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    with draft(tmp_path / "a") as beside:
        beside.symlink_to(mine)
    assert (mine / "file").exists()
    assert not os.path.lexists(beside)


def test_a_store_error_in_a_draft_keeps_its_own_text(tmp_path):
    error = StoreError("b", "be b", "c", "Do d.")
    with pytest.raises(StoreError) as caught, draft(tmp_path / "a"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "name", ["x" + OLD, OLD + "x", "." + "0" * 31 + ".tmp", "." + "G" * 32 + ".tmp", OLD[1:], "a.tmp"]
)
def test_other_names_are_no_drafts(name):
    assert is_draft(OLD)
    assert not is_draft(name)


# -- publishing -------------------------------------------------------------------------------------------------------


def make(path: Path, kind: str, text: str = "new") -> Path:
    """A file, or a folder with a file in it."""
    if kind == "folder":
        path.mkdir()
    (path / "in" if kind == "folder" else path).write_text(text)
    return path


def tree(folder: Path) -> dict[str, str]:
    return {str(one.relative_to(folder)): one.read_text() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture(
    params=[None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS], ids=["links", "EPERM", "EOPNOTSUPP", "ENOSYS"]
)
def link_error(request, monkeypatch):
    """A file system with hard links, and those without."""
    if request.param is not None:
        monkeypatch.setattr(_files.os, "link", refusing(request.param))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_finished_gets_a_free_name(tmp_path, link_error, kind):
    with draft(tmp_path / "a") as beside:
        make(beside, kind)
        assert publish(beside, tmp_path / "a") is True
    assert tree(tmp_path) == {"a/in" if kind == "folder" else "a": "new"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("taken", ["file", "folder"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_is_taken_stays_as_it_is(tmp_path, link_error, kind, taken):
    make(tmp_path / "a", taken, "old")
    before = tree(tmp_path)
    with draft(tmp_path / "a") as beside:
        make(beside, kind)
        assert publish(beside, tmp_path / "a") is False
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leads_nowhere_takes_a_name_too(tmp_path, link_error, kind):
    (tmp_path / "a").symlink_to(tmp_path / "missing")
    with draft(tmp_path / "a") as beside:
        make(beside, kind)
        assert publish(beside, tmp_path / "a") is False
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").is_symlink()


def test_a_published_file_has_one_name_and_the_rights_of_any_other(tmp_path, link_error):
    with draft(tmp_path / "a") as beside:
        make(beside, "file")
        publish(beside, tmp_path / "a")
    make(tmp_path / "other", "file")
    published, other = (tmp_path / "a").stat(), (tmp_path / "other").stat()
    assert published.st_nlink == 1
    assert stat.S_IMODE(published.st_mode) == stat.S_IMODE(other.st_mode)


@pytest.mark.parametrize(("function", "kind"), [("link", "file"), ("rename", "folder")])
def test_a_disk_that_refuses_to_publish_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, function, kind):
    monkeypatch.setattr(_files.os, function, refusing(errno.EIO))
    with pytest.raises(StoreError, match=r"a' must be writable, got Input/output error\."):
        with draft(tmp_path / "a") as beside:
            make(beside, kind)
            publish(beside, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_synced_once_something_was_published(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(_files, "sync_folder", synced.append)
    for _ in range(2):
        with draft(tmp_path / "a") as beside:
            publish(make(beside, "file"), tmp_path / "a")
    assert synced == [tmp_path]


# -- sweeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_old_draft_is_swept_away_and_a_young_one_stays(tmp_path, kind):
    old, young = make(tmp_path / OLD, kind), make(tmp_path / OLD.replace("0", "1"), kind)
    for path in (old, *old.glob("*"), *young.glob("*")):
        age(path, 3700)
    age(young, 3500)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_an_old_folder_in_which_a_file_was_touched_lately_stays(tmp_path):
    folder = make(tmp_path / OLD, "folder")
    age(folder, 1e6)
    age(folder / "in", 60)
    sweep(tmp_path)
    assert (folder / "in").exists()


@pytest.mark.parametrize(
    "name", [".hidden", ".tmp", "a.tmp", "x" + OLD, OLD + "~", "." + "0" * 33 + ".tmp", "00000000.npz"]
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_else_is_swept_away(tmp_path, name, kind):
    path = make(tmp_path / name, kind)
    for one in (*path.glob("*"), path):
        age(one, 1e6)
    sweep(tmp_path)
    assert len(tree(tmp_path)) == 1


def test_a_draft_further_down_is_not_swept_away(tmp_path):
    (tmp_path / "sub").mkdir()
    age(make(tmp_path / "sub" / OLD, "file"), 1e6)
    sweep(tmp_path)
    assert (tmp_path / "sub" / OLD).exists()


def test_a_link_named_like_an_old_draft_is_removed_alone(tmp_path):
    mine = tmp_path / "mine"
    make(mine, "folder")
    link = tmp_path / OLD
    link.symlink_to(mine)
    os.utime(link, (0, 0), follow_symlinks=False)
    sweep(tmp_path)
    assert tree(tmp_path) == {"mine/in": "new"}
    assert not os.path.lexists(link)


def test_a_folder_that_is_not_there_is_swept_without_a_word(tmp_path):
    sweep(tmp_path / "missing")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folders_are_made_with_those_above_and_may_be_there(tmp_path):
    for _ in range(2):
        make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(("name", "got"), [("file", "File exists"), ("file/deeper", "Not a directory")])
def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, name, got):
    (tmp_path / "file").write_text("mine")
    text = re.escape(f"{name}' must be a folder that can be written to, got {got}. Choose another folder.")
    with pytest.raises(StoreError, match=text):
        make_folders(tmp_path / name)


def test_a_folder_can_be_synced(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
