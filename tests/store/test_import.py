"""Hidden states of vLLM and speculators as a store; files are written as their connectors do, with `save_file`."""

from __future__ import annotations

import fcntl
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from activation_extractor import compare, export, import_store, open_store, statistics
from activation_extractor.errors import ArgumentError, ArgumentTypeError, StoreError
from activation_extractor.store import _import as module

LAYERS, HIDDEN = 2, 4


def request(tokens, seed=0, dtype=torch.float32, layers=LAYERS, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, layers, hidden, generator=generator).to(dtype)
    return {"hidden_states": states, "token_ids": torch.arange(seed, seed + tokens)}


@pytest.fixture
def folder(tmp_path):
    """Three requests of 3, 1 and 5 tokens, as speculators names them."""
    (tmp_path / "in").mkdir()
    for row, tokens in enumerate((3, 1, 5)):
        save_file(request(tokens, row), tmp_path / "in" / f"hs_{row}.safetensors")
    return tmp_path / "in"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_each_file_is_a_row_and_each_layer_a_ragged_column(tmp_path, dtype):
    (tmp_path / "in").mkdir()
    requests = {f"hs_{row}": request(tokens, row, dtype) for row, tokens in enumerate((3, 1, 5))}
    for name, tensors in requests.items():
        save_file(tensors, tmp_path / "in" / f"{name}.safetensors")
    store = import_store(tmp_path / "in", tmp_path / "out", layers=[2, 16])
    assert store.pairs == [("hidden_states.2", "full"), ("hidden_states.16", "full"), ("token_ids", "input")]
    assert store.ids == list(requests)
    for row, tensors in enumerate(requests.values()):
        for place, layer in enumerate(("hidden_states.2", "hidden_states.16")):
            found = store[layer, "full"][row]
            assert found.dtype == dtype
            assert torch.equal(found.float(), tensors["hidden_states"][:, place].float())
        assert torch.equal(store["token_ids", "input"][row], tensors["token_ids"])
    assert store.verify() == []


def test_it_is_read_compared_exported_and_drawn_like_any_other(folder, tmp_path):
    store = import_store(folder, tmp_path / "out")
    assert store.names == ["aux.0", "aux.1", "token_ids"]
    assert store["aux.1", "full"].shape == (3, None, 4)
    assert statistics(store["aux.0", "full"]).rows == 9
    assert store.row_of("hs_2") == 2
    assert compare(store, import_store(folder, tmp_path / "again")).first_difference is None
    save_file(request(5, 7), folder / "hs_2.safetensors")
    assert compare(store, import_store(folder, tmp_path / "other")).first_difference == "aux.0"
    export(store, tmp_path / "out.npz", "npz")
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    from activation_extractor import plots

    assert len(plots.norms(store).axes[0].get_xticks()) == 2  # the layers, and no token ids


def test_rows_are_in_the_order_of_the_numbers_in_names(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["hs_10", "hs_2", "hs_0", "cmpl-7f-1", "cmpl-7f-0", "12", "3", "hs_02"]
    for seed, name in enumerate(names):
        save_file(request(1, seed), tmp_path / "in" / f"{name}.safetensors")
    store = import_store(tmp_path / "in", tmp_path / "out")
    assert store.ids == ["3", "12", "cmpl-7f-0", "cmpl-7f-1", "hs_0", "hs_02", "hs_2", "hs_10"]
    assert [ids.item() for ids in store["token_ids", "input"]] == [names.index(name) for name in store.ids]


def test_names_of_layers_are_those_given_or_say_the_place(folder, tmp_path):
    assert import_store(folder, tmp_path / "a", layers=["h/0", 7]).names == ["h/0", "hidden_states.7", "token_ids"]
    assert import_store(folder, tmp_path / "b", layers=iter([1, 2])).names[0] == "hidden_states.1"
    with pytest.raises(ArgumentError, match=r"^layers must name each of the 2 layers in a file, got \['hidden_states"):
        import_store(folder, tmp_path / "c", layers=[1])
    with pytest.raises(ArgumentError, match=r"^layers must be different, got \[1, 1\]"):
        import_store(folder, tmp_path / "c", layers=[1, 1])
    for wrong in ("ab", 3, [1.5, 2], [True, 2], [None, 1]):
        with pytest.raises(ArgumentTypeError, match="^layers must be"):
            import_store(folder, tmp_path / "c", layers=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "in"]


def test_what_else_has_a_row_for_each_token_is_kept_beside_it(folder, tmp_path):
    mask = torch.tensor([True, False, True])
    save_file({**request(3), "loss_mask": mask, "scale": torch.ones(3, 2)}, folder / "hs_0.safetensors")
    store = import_store(folder, tmp_path / "out")
    assert torch.equal(store["loss_mask", "input"][0], mask)
    assert store["scale", "input"].rows.tolist() == [0]


def test_a_request_without_tokens_is_a_row_without_positions(folder, tmp_path):
    save_file(request(0), folder / "hs_1.safetensors")  # vLLM writes such a file for prompts that are embeddings
    assert import_store(folder, tmp_path / "out")["aux.0", "full"].lengths().tolist() == [3, 0, 5]


def test_nan_and_infinities_stay(folder, tmp_path):
    tensors = request(2)
    tensors["hidden_states"][0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, folder / "hs_1.safetensors")
    counted = statistics(import_store(folder, tmp_path / "out")["aux.0", "full"])
    assert (counted.nan_count, counted.inf_count) == (1, 1)


def cut(path):
    os.truncate(path, path.stat().st_size - 4)


def save(path, **tensors):
    save_file(tensors, path)


STATES, IDS = torch.ones(2, LAYERS, HIDDEN), torch.arange(2)
FAULTS = {
    "cut": (cut, "must be a readable safetensors file, got .*Remove it, or have it written anew"),
    "empty": (lambda path: path.write_bytes(b""), "must be a readable safetensors file"),
    "other bytes": (lambda path: path.write_bytes(b"PK" * 50), "must be a readable safetensors file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "got something else than a file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "got something else than a file"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "got something else than a file"),
    "no states": (lambda path: save(path, token_ids=IDS), "must hold 'hidden_states', got 'token_ids'"),
    "no ids": (lambda path: save(path, hidden_states=STATES), "must hold 'token_ids', got 'hidden_states'"),
    "one layer without an axis": (
        lambda path: save(path, hidden_states=STATES[:, 0].clone(), token_ids=IDS),
        r"must have hidden states \(tokens, layers, hidden\), got \(2, 4\)",
    ),
    "no layers": (lambda path: save(path, hidden_states=STATES[:, :0].clone(), token_ids=IDS), r"got \(2, 0, 4\)"),
    "ids of other tokens": (
        lambda path: save(path, hidden_states=STATES, token_ids=torch.arange(3)),
        r"must have as many tokens in each of its tensors, got \(3,\) in 'token_ids' beside \(2, 2, 4\)",
    ),
    "ids that are no integers": (
        lambda path: save(path, hidden_states=STATES, token_ids=IDS.float()),
        r"must have token ids that are integers, \(tokens,\), got float32 \(2,\)",
    ),
    "another tensor": (
        lambda path: save(path, hidden_states=STATES, token_ids=IDS, scale=torch.tensor(2.0)),
        r"got \(\) in 'scale' beside",
    ),
    "more layers": (lambda path: save_file(request(2, layers=3), path), r"got float32 \(3, 4\) after float32 \(2, 4\)"),
    "wider": (lambda path: save_file(request(2, hidden=8), path), r"got float32 \(2, 8\) after float32 \(2, 4\)"),
    "another dtype": (
        lambda path: save_file(request(2, dtype=torch.bfloat16), path),
        r"must have layers like the files before it, got bfloat16 \(2, 4\) after float32 \(2, 4\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_and_nothing_appears(folder, tmp_path, fault):
    spoil, text = FAULTS[fault]
    spoil(folder / "hs_1.safetensors")
    with pytest.raises(StoreError, match=text) as caught:
        import_store(folder, tmp_path / "out")
    assert caught.value.path == folder / "hs_1.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_is_still_written_is_an_error_and_a_lock_that_was_left_is_not(folder, tmp_path):
    lock = folder / "hs_1.safetensors.lock"
    lock.touch()
    (folder / "hs_9.safetensors.lock").touch()  # of a request that was given up
    assert import_store(folder, tmp_path / "one").rows == 3
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"hs_1.safetensors' must be complete, got a file that is still being wr"):
            import_store(folder, tmp_path / "two")
    assert import_store(folder, tmp_path / "two").rows == 3


def test_a_folder_without_such_files_says_what_it_has(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(StoreError, match="must hold safetensors files, got an empty folder. Give vLLM's shared_stor"):
        import_store(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "data_0.pt").touch()
    with pytest.raises(StoreError, match="must hold safetensors files, got others, such as 'data_0.pt'"):
        import_store(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "1.safetensors.zst").touch()
    with pytest.raises(StoreError, match="1.safetensors.zst' must be a plain safetensors file, got a compressed one"):
        import_store(tmp_path / "in", tmp_path / "out")
    with pytest.raises(StoreError, match="must be a folder of safetensors files, got No such file or directory"):
        import_store(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(StoreError, match="must be a folder of safetensors files, got Not a directory"):
        import_store(tmp_path / "in" / "data_0.pt", tmp_path / "out")


def test_other_files_are_passed_over_and_links_are_followed(folder, tmp_path):
    (folder / "dataset_info.json").write_text("{}")
    (folder / "hs_7.safetensors").symlink_to(folder / "hs_0.safetensors")
    store = import_store(folder, tmp_path / "out")
    assert store.ids == ["hs_0", "hs_1", "hs_2", "hs_7"]
    assert torch.equal(store["aux.0", "full"][3], store["aux.0", "full"][0])


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_is_never_overwritten(folder, tmp_path, there):
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[there]()
    with pytest.raises(StoreError, match=r"out' must be a new folder, got one that exists already\. Choose another"):
        import_store(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_appears_meanwhile_is_never_overwritten(folder, tmp_path, monkeypatch):
    out, read = tmp_path / "out", module._read

    def read_slowly(*arguments):
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("mine")
        return read(*arguments)

    monkeypatch.setattr(module, "_read", read_slowly)
    with pytest.raises(StoreError, match="must be a new folder"):
        import_store(folder, out)
    assert (out / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    for row in range(4):
        save_file(request(1 << 12, row, hidden=64), tmp_path / "in" / f"{row}.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(StoreError, match=r"must be writable, got File too large"):
            import_store(tmp_path / "in", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_files_may_be_removed_once_they_are_imported(folder, tmp_path):
    store = import_store(folder, tmp_path / "out")
    for path in folder.iterdir():
        os.truncate(path, 0)
    assert open_store(tmp_path / "out")["aux.0", "full"].flat().shape == (9, 4)
    assert store.verify() == []
