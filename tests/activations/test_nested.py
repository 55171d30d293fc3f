"""Nested tensors, as `nn.TransformerEncoder` gives its layers, and others that torch's operations hardly know."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from releases import release
from torch import Tensor, nn

from activation_extractor import (
    Activations,
    MemorySink,
    capture,
    compare,
    extract,
    inputs,
    open_store,
    position,
    preview,
)
from activation_extractor.errors import (
    ArgumentTypeError,
    MaskError,
    OverwrittenError,
    SequenceAxisError,
    TensorKindError,
)
from activation_extractor.reducers import max, mean

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of torch: prototypes, quantization
LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
PADDING = torch.tensor([[False, False, False, True], [False, False, True, True], [False] * 4])
MIDDLE = torch.tensor([[0, 1, 1, 1]] * 3)  # all but the first position


@pytest.fixture
def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 8)


class Runs(nn.Module):
    """A layer that is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def run(function: Callable[[Tensor], Any], times: int = 1, **options: Any) -> Activations:
    model = nn.Sequential(Runs(function))
    with capture(model, "0", **options) as acts:
        for _ in range(times):
            model(torch.ones(1))
    return acts


def of(*rows: Tensor, layout: torch.layout = torch.strided) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.nested.nested_tensor(list(rows), layout=layout)


def lengths(rows: Any) -> list[int]:
    return [len(row) for row in (rows.unbind() if isinstance(rows, Tensor) else rows)]


# -- an encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_of_an_encoder_are_reduced_over_their_real_positions(encoder, x, mode):
    reducers = ["mean", "first", "last", "max", position(1), position(-2)]
    with mode(), capture(encoder, "layers.*", reduce=["full", *reducers]) as acts:
        encoder(x, src_key_padding_mask=PADDING)
    for layer in ("layers.0", "layers.1"):
        rows = acts[layer, "full"].unbind()
        assert lengths(rows) == [3, 2, 4]
        expected = {
            "mean": [row.mean(0) for row in rows],
            "first": [row[0] for row in rows],
            "last": [row[-1] for row in rows],
            "max": [row.amax(0) for row in rows],
            "position(1)": [row[1] for row in rows],
            "position(-2)": [row[-2] for row in rows],
        }
        for name, values in expected.items():
            torch.testing.assert_close(acts[layer, name], torch.stack(values))


def test_a_store_holds_nested_rows_and_a_resume_finds_them(encoder, x, tmp_path):
    batches = [{"src": x, "src_key_padding_mask": PADDING, "id": ["a", "b", "c"]}]
    options = {"ids": "id", "reduce": ["full", "mean"], "out": tmp_path / "out", "progress": False}
    for _ in range(2):
        store = extract(encoder, batches, ["layers.*", ""], **options)
        assert lengths(store["layers.0", "full"][:]) == lengths(store["", "full"][:]) == [3, 2, 4]
    with torch.inference_mode(), capture(encoder, "layers.0") as acts:
        encoder(x, src_key_padding_mask=PADDING)
    for row, expected in zip(store["layers.0", "full"], acts["layers.0"].unbind(), strict=True):
        assert torch.equal(row, expected)
    with torch.inference_mode(), capture(encoder, "layers.0") as again:
        encoder(x, src_key_padding_mask=PADDING)
    assert compare(acts, {"layers.0": again["layers.0"]}).ok


def test_a_mask_that_is_asked_for_leaves_out_positions_of_nested_rows(encoder, x):
    sink = MemorySink()
    with torch.no_grad(), capture(encoder, "layers.0", reduce=["full", "first"], mask=MIDDLE, sink=sink):
        encoder(x, src_key_padding_mask=PADDING)
    with torch.no_grad(), capture(encoder, "layers.0", reduce=["full", "first"]) as acts:
        encoder(x, src_key_padding_mask=PADDING)
    rows = acts["layers.0", "full"].unbind()
    assert lengths(sink["layers.0", "full"]) == [2, 1, 3]
    assert torch.equal(sink["layers.0", "first"], torch.stack([row[1] for row in rows]))
    assert torch.equal(acts["layers.0", "first"], torch.stack([row[0] for row in rows]))


@pytest.mark.parametrize("mask", ["src_key_padding_mask", None, {"layers.*": None}, lambda layer, value, mask: mask])
def test_other_masks_of_a_call_do_not_change_what_is_real(encoder, x, mask):
    found = []
    for option in ({}, {"mask": mask}):
        with torch.no_grad(), capture(encoder, "layers.*", reduce="mean", **option) as acts:
            encoder(x, src_key_padding_mask=PADDING)
        found.append(acts["layers.1"])
    assert torch.equal(*found)


def test_a_mask_or_axis_that_cannot_be_of_nested_rows_is_refused(encoder, x):
    for options in ({"mask": MIDDLE[:, :3]}, {"mask": MIDDLE[:2]}):
        with torch.no_grad(), capture(encoder, "layers.0", reduce="mean", missing="skip", **options):
            with pytest.raises(MaskError, match="must have shape"):
                encoder(x, src_key_padding_mask=PADDING)
    for axis in (2, {"layers.*": None}):
        with torch.no_grad(), capture(encoder, "layers.0", reduce="mean", missing="skip", sequence_axis=axis):
            with pytest.raises(SequenceAxisError, match="must have its sequence in axis 1, as a nested tensor has"):
                encoder(x, src_key_padding_mask=PADDING)


def test_calls_of_nested_rows_are_joined_row_by_row(encoder, x):
    acts = {}
    for calls in ("join", "all"):
        with torch.no_grad(), capture(encoder, "layers.0", reduce=["full", "mean"], calls=calls) as acts[calls]:
            encoder(x, src_key_padding_mask=PADDING)
            encoder(2 * x, src_key_padding_mask=PADDING)
    one, other = (call.unbind() for call in acts["all"]["layers.0", "full"])
    expected = [torch.cat(pair) for pair in zip(one, other, strict=True)]
    joined = acts["join"]["layers.0", "full"].unbind()
    assert all(torch.equal(row, wanted) for row, wanted in zip(joined, expected, strict=True))
    torch.testing.assert_close(acts["join"]["layers.0", "mean"], torch.stack([row.mean(0) for row in expected]))


def test_a_nested_call_is_joined_with_one_that_has_padding():
    values = iter([torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), torch.full((2, 2, 3), 2.0)])
    mask = iter([torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1, 1], [1, 0]])])
    sink = MemorySink()
    model = nn.Sequential(Runs(lambda _: next(values)))
    with capture(model, "0", calls="join", sink=sink, mask=lambda *_: next(mask)) as acts, acts.step():
        model(torch.ones(1))
        model(torch.ones(1))
    assert [row[:, 0].tolist() for row in sink["0", "full"]] == [[1, 1, 2, 2], [1, 2]]


def test_inputs_and_previews_of_nested_values(encoder, x):
    with torch.no_grad(), capture(encoder, [inputs("layers.1"), "layers.0"]) as acts:
        encoder(x, src_key_padding_mask=PADDING)
    assert lengths(acts["layers.1:input"]) == [3, 2, 4]
    rows = preview(encoder, "layers.*", x, src_key_padding_mask=PADDING)
    assert [(row.shape_text, row.nbytes) for row in rows] == [("nested", 9 * 8 * 4)] * 2


def test_a_model_that_is_called_with_nested_rows_is_extracted_and_resumed(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)])
    for _ in range(2):
        store = extract(nn.Sequential(nn.Linear(4, 3)), [{"input": nested}], "0", out=tmp_path / "out", progress=False)
        torch.manual_seed(0)
    assert lengths(store["0"][:]) == [2, 1]


# -- rows of every form -----------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("features", [(), (3,), (2, 3)], ids=str)
def test_rows_may_have_any_number_of_axes(layout, features, tmp_path):
    rows = [torch.randn(2, *features), torch.randn(3, *features)]
    assert torch.equal(run(of(*rows, layout=layout), reduce="last")["0"], torch.stack([row[-1] for row in rows]))
    run(of(*rows, layout=layout), sink=tmp_path / "store")
    stored = open_store(tmp_path / "store")["0"]
    assert stored.shape == (2, None, *features)
    assert all(torch.equal(row, wanted) for row, wanted in zip(stored, rows, strict=True))


@LAYOUTS
def test_an_empty_row_is_stored_and_cannot_be_reduced(layout):
    make, sink = of(torch.ones(2, 3), torch.ones(0, 3), layout=layout), MemorySink()
    run(make, sink=sink)
    assert lengths(sink["0", "full"]) == [2, 0]
    for reducer in ("mean", "first", "last", "max", position(0)):
        with pytest.raises(TensorKindError, match="got a nested tensor without a real position in row 1. Leave empty"):
            run(make, reduce=reducer)


def test_rows_that_differ_in_more_than_their_length_are_refused_where_that_matters():
    make = of(torch.ones(2, 3), torch.ones(3, 4))
    assert "nested" in repr(run(make))
    for options in ({"reduce": "mean"}, {"sink": MemorySink()}):
        with pytest.raises(TensorKindError, match=r"^The value of layer '0' must .* rows of shapes \(2, 3\), \(3, 4\)"):
            run(make, **options)
    with pytest.raises(TensorKindError, match="got a nested tensor without rows"):
        run(of(), sink=MemorySink())


@LAYOUTS
def test_references_graphs_and_copies_of_nested_values(layout):
    made: list[Tensor] = []

    def grows(_: Tensor) -> Tensor:
        made.append(torch.nested.nested_tensor([torch.ones(2, 3)], layout=layout, requires_grad=True) * 2)
        return made[-1]

    kept, referred, differentiable = run(grows), run(grows, copy=False), run(grows, detach=False, reduce="mean")
    assert not kept["0"].requires_grad
    assert differentiable["0"].requires_grad
    differentiable["0"].sum().backward()
    with torch.no_grad():
        made[0].mul_(2)
        made[1].mul_(2)
    assert kept["0"].unbind()[0].unique().tolist() == [2]
    with pytest.raises(OverwrittenError):
        referred["0"]
    for twin in (copy.deepcopy(kept), copy.copy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(twin["0"].unbind()[0], torch.full((2, 3), 2.0))
    assert copy.deepcopy(kept)["0"].unbind()[0].data_ptr() != kept["0"].unbind()[0].data_ptr()


def test_reducers_of_ones_own_are_given_the_nested_tensor():
    make = of(torch.ones(2, 3), torch.ones(1, 3))
    sink = MemorySink()
    run(make, reduce={"twice": lambda activation, mask: activation * 2}, sink=sink)
    assert lengths(sink["0", "twice"]) == [2, 1]
    assert torch.equal(run(make, reduce=lambda activation, mask: mean(activation, mask))["0"], torch.ones(2, 3))
    with pytest.raises(TensorKindError, match=r"for reducer '<lambda>', got a nested tensor\. Convert it in a reducer"):
        run(make, reduce=lambda activation, mask: activation.amax(1))
    with pytest.raises(KeyError, match="mine"):
        run(make, reduce=lambda activation, mask: {}["mine"])


# -- quantized numbers, and dtypes with few operations ----------------------------------------------------------------


@pytest.mark.parametrize("calls", ["join", "all"])
def test_quantized_calls_of_different_scales_keep_their_numbers(calls):
    scales = iter([0.0125, 0.5])
    quantize = lambda _: torch.quantize_per_tensor(torch.tensor([[[1.0, 2, 3]]]), next(scales), 0, torch.quint8)  # noqa: E731
    sink = MemorySink()
    model = nn.Sequential(Runs(quantize))
    with capture(model, "0", calls=calls, sink=sink) as acts, acts.step():
        model(torch.ones(1))
        model(torch.ones(1))
    found = torch.cat(sink["0", "full"] if calls == "join" else [*sink["0#0", "full"], *sink["0#1", "full"]])
    torch.testing.assert_close(found, torch.tensor([[1.0, 2, 3]] * 2))


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True], [True, False]])], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"])
def test_dtypes_that_torch_hardly_computes_in_are_reduced(dtype, mask):
    if dtype == "uint64" and mask is not None and release("torch") < (2, 12):
        pytest.skip("torch.where takes no uint64 there")
    dtype = getattr(torch, dtype)
    activation = torch.tensor([[[1, 4], [3, 2]], [[2, 1], [4, 7]]]).to(dtype)
    is_float = dtype.is_floating_point
    greatest, means = max(activation, mask), mean(activation, mask)
    assert greatest.dtype == dtype
    assert means.dtype == (dtype if is_float else torch.float32)
    assert greatest.float().tolist() == [[3, 4], [4, 7] if mask is None else [2, 1]]
    assert means.float().tolist() == [[2, 3], [3, 4] if mask is None else [2, 1]]


def test_the_greatest_of_uint64_is_in_their_order():
    activation = torch.tensor([[[1], [2**63 + 5], [7]]], dtype=torch.uint64)
    assert max(activation, None).tolist() == [[2**63 + 5]]


def test_kept_columns_are_plain_numbers(tmp_path):
    def stored(column):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model = nn.Sequential(nn.Linear(2, 2))
        with capture(model, "0", sink=folder) as acts, acts.step(keep={"mine": column}):
            model(torch.ones(2, 2))
        return open_store(folder).keep["mine"][:].tolist()

    assert stored(torch.eye(2).to_sparse()) == [[1, 0], [0, 1]]
    for column in (torch.ones(2, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])):
        with pytest.raises(ArgumentTypeError, match="^keep must hold numbers or text in column 'mine'"):
            stored(column)
