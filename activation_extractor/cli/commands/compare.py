"""``activation-extractor compare``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from activation_extractor._display import dtype_name
from activation_extractor.cli._terminal import say, say_json
from activation_extractor.errors import ArgumentError

if TYPE_CHECKING:
    from activation_extractor.comparison import LayerComparison


def compare(
    left: Annotated[Path, typer.Argument(help="The reference: a store's folder, or a file.", metavar="LEFT")],
    right: Annotated[Path, typer.Argument(help="A store's folder, or a file, to compare with it.", metavar="RIGHT")],
    match: Annotated[
        list[str] | None,
        typer.Option(
            help="Which layers belong together, by name or pattern; repeatable. By default those of one name.",
            metavar="LEFT=RIGHT",
        ),
    ] = None,
    by_order: Annotated[
        bool, typer.Option("--by-order", help="The first layer that ran belongs to the first, and so on.")
    ] = False,
    rtol: Annotated[
        list[str] | None,
        typer.Option(
            help="Relative to the values on the left: a number, or PATTERN=NUMBER for some layers; repeatable, the "
            "first pattern that fits counts, and the number is for the rest. By default as the dtype rounds.",
            metavar="TOLERANCE",
        ),
    ] = None,
    atol: Annotated[
        list[str] | None,
        typer.Option(
            help="Absolute, in the same forms. By default rtol times the root mean square of the layer on the left.",
            metavar="TOLERANCE",
        ),
    ] = None,
    check_dtype: Annotated[
        bool | None,
        typer.Option(
            "--check-dtype/--no-check-dtype",
            help="Whether another dtype is a difference. By default it is, unless all layers differ in it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for a script.")] = False,
) -> None:
    """Compare two runs layer by layer, and find the first layer that differs.

    Each of them is a store, or a .safetensors or .npz file that Activations.save wrote. In the table > marks the first
    layer that differs, and x the others that do. A value differs where |right - left| > atol + rtol * |left|.

    The exit code is 0 when nothing differs, 1 when something does, and 2 on a mistake.

    \b
    Examples:
        activation-extractor compare before after
        activation-extractor compare ours.safetensors theirs.npz --match 'h.*=layers.*' --match ln_f=norm
        activation-extractor compare before after --rtol 1e-3 --rtol 'h.*=1e-2'
        activation-extractor compare before after --json | jq -r .first_difference
    """
    from activation_extractor.comparison import _compare

    pairs = _match(match or [], by_order)
    tolerances = {"rtol": _tolerance("--rtol", rtol or []), "atol": _tolerance("--atol", atol or [])}
    found = _compare.compare(_opened(left), _opened(right), match=pairs, check_dtype=check_dtype, **tolerances)
    if as_json:
        head = {"left": str(left), "right": str(right), "ok": found.ok, "first_difference": found.first_difference}
        say_json({**head, "layers": [_layer(row) for row in found]})
    else:
        say(found.table())
    if not found.ok:
        raise typer.Exit(1)


def _match(given: Sequence[str], by_order: bool) -> dict[str, str] | Literal["order"] | None:
    """Which layers belong together, as `compare` takes it."""
    if by_order and given:
        raise ArgumentError("--by-order", "go without --match", f"--match {given[0]}", "Leave one of them out.")
    pairs: dict[str, str] = {}
    for pair in given:
        name, mark, other = pair.partition("=")
        if not mark or "=" in other:
            raise ArgumentError("--match", "be LEFT=RIGHT", pair, "Write names or patterns, as in 'h.*=layers.*'.")
        if name in pairs:
            advice = f"There is {f'{name}={pairs[name]}'!r} too."
            raise ArgumentError("--match", "name each left side once", pair, advice)
        pairs[name] = other
    return "order" if by_order else pairs or None


def _tolerance(option: str, given: Sequence[str]) -> float | dict[str, float] | None:
    """A tolerance as `compare` takes it: one number, or by pattern, the one for the rest last."""
    numbers: dict[Any, float] = {}
    for value in given:
        pattern, mark, text = value.rpartition("=")
        key = pattern if mark else None
        if key in numbers:
            raise ArgumentError(option, "be given once for each pattern, and once for the rest", value)
        try:
            numbers[key] = float(text)
        except ValueError:
            raise ArgumentError(option, "be a number or PATTERN=NUMBER", value) from None
    rest = numbers.pop(None, None)
    if numbers and rest is not None:
        numbers.setdefault("**.*", rest)  # fits each name, the model's own too, which is empty
    return numbers or rest


def _opened(path: Path) -> Any:
    """The store or file at a path; a path that does not exist and has no suffix must be a store."""
    from activation_extractor.activations._saved import SavedActivations
    from activation_extractor.store import open_store

    is_folder = path.is_dir() or not (path.suffix or path.exists())
    return open_store(path) if is_folder else SavedActivations(path)


def _layer(row: LayerComparison) -> dict[str, Any]:
    from dataclasses import asdict

    about: dict[str, Any] = asdict(row)
    about["dtypes"] = [None if dtype is None else dtype_name(dtype) for dtype in row.dtypes]
    # JSON has no NaN and no infinity.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in about.items()
    }
