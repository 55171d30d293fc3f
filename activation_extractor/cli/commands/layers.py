"""``activation-extractor layers``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_extractor._display import aligned, dtype_name, one_line, plural
from activation_extractor.cli._terminal import say, say_json, warn

if TYPE_CHECKING:
    from activation_extractor.activations import LayerPreview, Preview
    from activation_extractor.cli._models import Loaded

_MOST_LINES = 60
_COLUMNS = ("name", "type", "parameters")
_RUN_COLUMNS = ("output", "dtype", "bytes per row", "calls")
_COUNTS = ("parameters", "bytes per row", "calls")  # which are aligned to the right


def layers(
    model: Annotated[
        str,
        typer.Argument(help="A folder with a config.json, the id of a transformers model, or package.module:factory."),
    ],
    layers: Annotated[
        list[str] | None, typer.Option(help="Show only the layers that a name or pattern selects; repeatable.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts; always every layer.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show each of many repeated blocks.")] = False,
) -> None:
    """List the layers of a model: their names, and what they return for a small example.

    The names are those that capture and --layers take: * stands for anything within a dotted segment, ** for any
    number of segments, [8-11] for a number. Bytes are those of one row (one text, one image) of the example.

    \b
    Examples:
        activation-extractor layers gpt2
        activation-extractor layers ./my-model --layers 'encoder.layer.*'
        activation-extractor layers my_package.models:build --json
    """
    from activation_extractor.cli._models import load_model

    loaded = load_model(model, trust_remote_code=trust_remote_code)
    rows, reason = _preview(loaded, layers)
    notes = [*loaded.notes, *([reason] if reason else [])]
    for note in notes:
        warn(note)
    if as_json:
        say_json(_content(loaded, rows, notes))
        return
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    selected = f" selected by {', '.join(map(repr, layers))}" if layers else ""
    title = f"{loaded.name}: {type(loaded.model).__name__}, {parameters:,} parameters"
    say(f"{title}, {plural(len(rows), 'layer')}{selected}")
    say("\n".join(_lines(rows, collapses=not show_all and len(rows) > _MOST_LINES)))


def _preview(loaded: Loaded, layers: Sequence[str] | None) -> tuple[Preview, str]:
    """The rows of the selected layers, and a sentence that says why there are no shapes."""
    from torch.jit import ScriptModule

    from activation_extractor.activations import preview
    from activation_extractor.cli._models import example_batch

    selection: Any = list(layers or ()) or (lambda name, module: not isinstance(module, ScriptModule))
    if not layers and not any(True for _ in loaded.model.children()):
        selection = ""  # nothing but the root
    without_shapes = preview(loaded.model, selection)
    try:
        batch = example_batch(loaded)
        if batch is None:
            return without_shapes, "Shapes are left out: there is no example to run this model on."
        return preview(loaded.model, selection, **batch), ""
    except Exception as error:  # the model's own code may raise anything on an example that does not fit it
        return without_shapes, f"Shapes are left out: running an example raised {one_line(error):.200}"


def _content(loaded: Loaded, rows: Preview, notes: Sequence[str]) -> dict[str, Any]:
    described = [
        {
            "name": row.name,
            "type": row.type,
            "parameters": row.parameters,
            "calls": row.calls,
            "shape": None if row.shape is None else list(row.shape),
            "dtype": None if row.dtype is None else dtype_name(row.dtype),
            "bytes": None if row.dtype is None else row.nbytes,
            "bytes_per_row": row.bytes_per_row,
        }
        for row in rows
    ]
    return {
        "model": loaded.name,
        "class": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "count": len(rows),
        "notes": notes,
        "layers": described,
    }


def _lines(rows: Preview, *, collapses: bool) -> list[str]:
    """The table's lines. Plain text, since a table that is drawn for a terminal is cut to 80 columns in a pipe."""
    has_run = any(row.calls is not None for row in rows)
    columns = (*_COLUMNS, *_RUN_COLUMNS) if has_run else _COLUMNS
    cells: list[tuple[str, ...]] = [columns]
    repeats = _repeats(rows) if collapses else {}
    for index, row in enumerate(rows):
        if index not in repeats:
            cells.append(_cells(row)[: len(columns)])
        elif repeats[index]:
            cells.append((repeats[index], *[""] * (len(columns) - 1)))
    return aligned(cells, "".join(">" if name in _COUNTS else "<" for name in columns))


def _cells(row: LayerPreview) -> tuple[str, ...]:
    dtype = dtype_name(row.dtype)
    counts = ["" if count is None else f"{count:,}" for count in (row.bytes_per_row, row.calls)]
    return row.name or "(the model)", row.type, f"{row.parameters:,}", row.shape_text, dtype, *counts


def _repeats(rows: Preview) -> dict[int, str]:
    """The rows to leave out, by their numbers: those of blocks that are like the block before them.

    The first row of a run of such blocks has the line that stands for all of them, the others an empty one.
    """
    subtrees: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        segments = row.name.split(".")
        for depth in range(1, len(segments) + 1):
            subtrees[".".join(segments[:depth])].append(index)
    alike: dict[str, list[str]] = {}  # the first block of a run, and the blocks that are like it
    first_of: dict[str, str] = {}
    for name in subtrees:
        parent, dot, number = name.rpartition(".")
        before = f"{parent}{dot}{int(number) - 1}" if number.isdecimal() and number != "0" else ""
        if before in subtrees and _form(rows, subtrees[name], name) == _form(rows, subtrees[before], before):
            first = first_of[name] = first_of.get(before, before)
            alike.setdefault(first, []).append(name)
    return _left_out(subtrees, alike)


def _left_out(subtrees: dict[str, list[int]], alike: dict[str, list[str]]) -> dict[int, str]:
    left_out: dict[int, str] = {}
    for first, names in alike.items():
        members = [index for name in names for index in subtrees[name]]
        if len(members) == 1 or members[0] in left_out:
            continue  # a single line takes no more room than the line in its place; or an outer block has it
        numbers = dict.fromkeys(name.rpartition(".")[2] for name in (names[0], names[-1]))
        left_out |= dict.fromkeys(members, "")
        left_out[members[0]] = f"... {len(names)} more like {first}: {' to '.join(numbers)}"
    return left_out


def _form(rows: Preview, members: Sequence[int], name: str) -> list[tuple[Any, ...]]:
    return [(rows[index].name.removeprefix(name), *_cells(rows[index])[1:]) for index in members]
