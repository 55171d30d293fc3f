"""`preview`: what a capture would give and take, told without keeping anything."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from models import Repeating, count_hooks
from torch import Tensor, nn

from activation_extractor import blocks, capture, gradients, inputs, outputs
from activation_extractor.activations import LayerPreview, Preview, preview
from activation_extractor.errors import ArgumentTypeError, LayerNotFoundError, TransformedCallError


class Structured(nn.Module):
    """A layer that returns a pair with a list in it, one that returns nothing, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.pair, self.silent, self.spare = Pair(), Silent(), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        self.silent(x)
        return self.pair(self.norm(x), scale=torch.ones(3, 1, dtype=torch.float64))[0]


class Pair(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x.sum(1), {"scaled": (x * 2).to(torch.bfloat16)}


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        self.seen = len(x)


SAMPLE = torch.randn(3, 5, 4)


def test_it_tells_name_type_parameters_shape_dtype_and_bytes(stack, tokens):
    rows = preview(stack, "h.*", tokens)
    assert isinstance(rows, Preview)
    assert rows[0] == LayerPreview("h.0", "h.0", "Block", 88, 1, (2, 5, 8), torch.float32, 320, 160)
    assert [row.name for row in rows] == blocks(stack)
    assert rows.nbytes == 4 * 320


@pytest.mark.parametrize("layers", ["**", inputs("**"), [outputs("h.0"), inputs("h.0", select="x")], {"new": "h.1"}])
def test_it_is_what_a_capture_records(stack, tokens, layers):
    with torch.inference_mode(), capture(stack, layers) as acts:
        stack(tokens)
    rows = preview(stack, layers, tokens)
    assert {row.name: (row.shape, row.dtype) for row in rows} == {
        name: (tuple(value.shape), value.dtype) for name, value in acts.items()
    }
    assert rows.nbytes == acts.nbytes


def test_parts_of_structured_values_are_selected_as_in_a_capture():
    model = Structured()
    chosen = {
        "sum": outputs("pair"),
        "scaled": outputs("pair", select=lambda value: value[1]["scaled"]),
        "scale": inputs("pair", select="scale"),
        "absent": outputs("pair", select=7),
    }
    rows = {row.name: row for row in preview(model, chosen, SAMPLE)}
    assert (rows["sum"].shape, rows["sum"].dtype) == ((3, 4), torch.float32)
    assert (rows["scaled"].shape, rows["scaled"].dtype, rows["scaled"].nbytes) == ((3, 5, 4), torch.bfloat16, 120)
    assert (rows["scale"].shape, rows["scale"].dtype) == ((3, 1), torch.float64)
    assert (rows["absent"].shape, rows["absent"].calls, rows["absent"].shape_text) == (None, 1, "no tensor")


def test_a_gradient_has_the_shape_of_its_layers_output(stack, tokens):
    (row,) = preview(stack, gradients("h.1"), tokens)
    assert (row.name, row.layer, row.shape) == ("h.1:gradient", "h.1", (2, 5, 8))


def test_a_layer_that_does_not_run_or_returns_no_tensor_is_a_row_that_says_so():
    rows = {row.name: row for row in preview(Structured(), "*", SAMPLE)}
    assert (rows["spare"].calls, rows["spare"].nbytes, rows["spare"].shape_text) == (0, 0, "did not run")
    assert (rows["silent"].calls, rows["silent"].nbytes, rows["silent"].shape_text) == (1, 0, "no tensor")
    assert rows["spare"].bytes_per_row is rows["silent"].bytes_per_row is None


def test_calls_are_counted_and_the_bytes_are_those_of_the_last_one():
    (row,) = preview(Repeating(), "layer", torch.randn(2, 4))
    assert (row.calls, row.nbytes, row.bytes_per_row) == (3, 32, 16)


def test_bytes_per_row_count_the_examples_rows_and_are_rounded_up():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 1))  # its rows are positions
    assert [row.bytes_per_row for row in preview(model, "*", SAMPLE)] == [80, 20]
    assert preview(nn.Sequential(nn.Flatten(0)), "0", torch.zeros(3, 1).bool())[0].bytes_per_row == 1
    odd = nn.Sequential(nn.Linear(2, 1))
    assert preview(odd, inputs("0"), input=torch.zeros(2).expand(3, 2))[0].bytes_per_row == 8
    assert preview(odd, outputs("0"), torch.zeros(2))[0].bytes_per_row == 2


def test_a_part_of_a_byte_counts_as_one():
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1]

    (row,) = preview(nn.Sequential(First()), "0", torch.zeros(2, 3, dtype=torch.bool))
    assert (row.nbytes, row.bytes_per_row) == (3, 2)


def test_a_number_or_no_tensor_at_all_has_no_rows():
    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, count: int | Tensor) -> Tensor:
            return self.act(torch.ones(2, 3) * count)

    for example in (2, torch.tensor(2)):
        (row,) = preview(Numbers(), "act", example)
        assert (row.shape, row.nbytes, row.bytes_per_row) == ((2, 3), 24, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_told_without_a_shape():
    nested = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(1, 4)])
    (row,) = preview(nn.Sequential(nn.ReLU()), "0", nested)
    assert (row.shape, row.dtype, row.nbytes, row.shape_text) == (None, torch.float32, 48, "nested")


def test_without_an_example_nothing_runs(stack):
    stack.register_forward_hook(lambda *_: pytest.fail("it ran"))
    rows = preview(stack, ["h.0", "embed"])
    assert [(row.name, row.type, row.parameters, row.calls) for row in rows] == [
        ("h.0", "Block", 88, None),
        ("embed", "Embedding", 400, None),
    ]
    assert rows.nbytes == 0
    assert repr(rows) == (
        "Preview: 2 layers, 0 B\n  name   type       parameters\n  h.0    Block      88\n  embed  Embedding  400"
    )


def test_the_model_runs_in_eval_and_is_left_as_it_was(cnn):
    cnn.train()
    cnn.head.eval()
    flags = [module.training for module in cnn.modules()]
    running = cnn.norm.running_mean.clone()
    seen = []
    cnn.conv.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    before = count_hooks(cnn)
    preview(cnn, "*", torch.randn(2, 3, 8, 8))
    assert seen == [(False, True)]
    assert [module.training for module in cnn.modules()] == flags
    assert torch.equal(cnn.norm.running_mean, running)
    assert count_hooks(cnn) == before
    assert not torch.is_inference_mode_enabled()


def test_a_forward_that_raises_leaves_nothing_behind(cnn):
    cnn.train()
    with pytest.raises(RuntimeError, match="expected input"):
        preview(cnn, "*", torch.randn(2, 5, 8, 8))
    assert count_hooks(cnn) == 0
    assert cnn.training
    with capture(cnn, "conv") as acts:
        cnn(torch.randn(2, 3, 8, 8))
    assert list(acts) == ["conv"]


def test_no_value_outlives_its_layer():
    alive = []

    def count(module: nn.Module, args: object, output: object) -> None:
        gc.collect()
        alive.append(sum(type(one) is Tensor and one.shape == (2, 31, 17) for one in gc.get_objects()))

    model = nn.Sequential(*[nn.Linear(17, 17) for _ in range(6)])
    for layer in model:
        layer.register_forward_hook(count)
    preview(model, "*", torch.randn(2, 31, 17))
    assert alive == [2, 3, 3, 3, 3, 3]  # the example, a layer's input (at first the example) and its output


def test_a_compiled_model_is_previewed_too(stack, tokens):
    compiled = torch.compile(stack, backend="eager")
    compiled(tokens)
    assert [row.calls for row in preview(compiled, "h.*", tokens)] == [1] * 4


def test_mistakes_are_those_of_capture(stack, tokens):
    with pytest.raises(LayerNotFoundError, match=re.escape("No layer matches 'h.00'. Close matches: 'h.0'.")):
        preview(stack, "h.00", tokens)
    with pytest.raises(ArgumentTypeError, match="model must be a torch.nn.Module"):
        preview("model", "*")

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.inner)(x)

    with pytest.raises(TransformedCallError, match="'inner'"):
        preview(Mapped(), "inner", torch.randn(2, 4))


def test_it_is_a_sequence_whose_slices_are_previews(stack, tokens):
    rows = preview(stack, "h.*", tokens)
    assert len(rows[1:3]) == 2
    assert rows[1:3].nbytes == 640
    assert rows[-1].name == "h.3"
    assert rows.index(rows[2]) == 2


def test_it_shows_itself_as_a_table():
    rows = preview(Structured(), ["norm", "silent", "spare"], SAMPLE)
    assert repr(rows) == (
        "Preview: 3 layers, 240 B\n"
        "  name    type       parameters  shape        dtype    bytes  bytes per row  calls\n"
        "  norm    LayerNorm  8           (3, 5, 4)    float32  240    80             1\n"
        "  silent  Silent     0           no tensor                                   1\n"
        "  spare   Linear     20          did not run                                 0"
    )
    html = rows._repr_html_()
    assert "<caption>Preview: 3 layers, 240 B</caption>" in html
    assert "<tr><th>name</th><th>type</th>" in html
    assert "<td>did not run</td>" in html
