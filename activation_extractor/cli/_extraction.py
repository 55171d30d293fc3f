"""What ``activation-extractor extract`` does, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from activation_extractor._display import examples, plural, short_path
from activation_extractor._format._codecs import Codec
from activation_extractor._format._manifest import has_manifest, read_manifest
from activation_extractor.cli._estimate import Probe, check_out, check_room, estimate, probe
from activation_extractor.cli._failing_rows import FailingRow, failed_before, failing_row, find_failing
from activation_extractor.cli._feed import Feed, make_feed
from activation_extractor.cli._fresh import set_aside
from activation_extractor.cli._mask_option import read_masks
from activation_extractor.cli._models import DTYPES, Loaded, load_model
from activation_extractor.cli._padding_check import padding_note
from activation_extractor.cli._terminal import warn
from activation_extractor.cli.inputs import BadRows, Source, open_source
from activation_extractor.errors import ArgumentError, StoreError
from activation_extractor.layers import blocks
from activation_extractor.layers._modules import unwrap
from activation_extractor.layers._selections import resolve
from activation_extractor.reducers._layouts import Layouts
from activation_extractor.runs import extract
from activation_extractor.runs._ranks import share_of
from activation_extractor.store import Store, open_store

_MOST_WINDOW_ROWS = 8192  # that are sorted together, where a unit has more


class Extraction:
    """A run over a data set, into a folder; its methods are called in their order, and raise what their parts raise."""

    def __init__(self, out: Path, codec: Codec, *, resume: bool, append: bool) -> None:
        if append and not resume:
            raise ArgumentError("append", "be left out with --fresh", append)
        check_out(out, codec, resume=resume)
        self._out, self._resume, self._append = out, resume, append
        self._source: Source
        self._loaded: Loaded
        self._feed: Feed

    def read(self, name: str, *, skip_bad_rows: Path | None, **options: Any) -> None:
        """Look through the rows of an input; options are those of `open_source`."""
        self._failed_before = list(failed_before(skip_bad_rows))
        self._bad_rows, self._bad_file = BadRows(skip_bad_rows), str(skip_bad_rows)
        self._source = open_source(name, bad_rows=self._bad_rows, **options)

    def load(self, model: str, **options: Any) -> None:
        """Load the model; options are those of `load_model`."""
        self._loaded = load_model(model, **options)

    def prepare(self, **options: Any) -> None:
        """Make batches of the rows, and say what a user should know of them; options are those of `make_feed`."""
        loaded = self._loaded
        self._feed = make_feed(self._source, loaded.model, loaded.prepare, bad_rows=self._bad_rows, **options)
        for note in (*loaded.notes, *self._source.notes, *self._feed.notes):
            warn(note)

    def run(
        self, layers: Any, *, rows_per_unit: int | None, store_dtype: str, sharing: Mapping[str, Any], **options: Any
    ) -> Store:
        """Say what is going to be stored, and store it; options are those of `extract`, and so is `sharing`."""
        model, feed, entries = self._loaded.model, self._feed, self._feed.options
        selection = layers or _default_layers(model, options["sequence_axis"])
        pooling_mask = entries.get("pooling_mask")
        rows = self._source.rows
        options["dtype"], options["mask"] = DTYPES.get(store_dtype), read_masks(options["mask"])
        expected = estimate(model, feed, selection, rows, pooling_mask=pooling_mask, **options)
        warn(str(expected))
        check_room(self._out, expected.nbytes, resume=self._resume)
        if not self._resume and (aside := set_aside(self._out)) is not None:
            warn(f"The earlier store is in {short_path(aside)!r} now.")
        options["rows_per_unit"] = rows_per_unit or self._stored_unit_rows or expected.unit_rows
        feed.window_rows = min(options["rows_per_unit"], _MOST_WINDOW_ROWS)
        options |= {"out": self._out, "append": self._append, "resume": self._resume, **entries, **sharing}
        names = ("reduce", "stop_early", "mask", "sequence_axis")
        run = probe(
            model, selection, pooling_mask=pooling_mask, **{name: options[name] for name in names if name in options}
        )
        if note := padding_note(feed, run):
            warn(note)
        try:
            store = self._store(selection, run, options)
        except KeyboardInterrupt:
            self._say_stopped(options["rows_per_unit"])
            raise  # typer ends with the code of an interrupt
        for note in feed.last_notes:
            warn(note)
        if self._bad_rows.count:
            warn(f"{plural(self._bad_rows.count, 'row')} left out; {self._bad_file!r} lists them.")
        return store

    def _store(self, selection: Any, run: Probe, options: dict[str, Any]) -> Store:
        """Run the model over all rows; where windows of some fail, again without them from the last unit on."""
        if "group" not in options:
            options["on_failure"] = self._report if self._bad_rows.are_skipped else None
        elif self._stored_unit_rows:
            self._leave_out(self._failed_before)
        while True:
            try:
                return extract(self._loaded.model, self._feed, selection, **options)
            except StoreError:
                raise
            except Exception:
                failing = find_failing(self._feed, run)
                if not failing:
                    raise
                self._leave_out(failing)
                options["resume"] = True

    def _report(self, row_id: str | int, error: Exception) -> None:
        """Report a row of the latest batch that was left out."""
        row = next(row for known, row, _ in self._feed.current if known == row_id)
        self._bad_rows.report(*failing_row(row, error))

    def _leave_out(self, rows: Iterable[FailingRow]) -> None:
        """Leave out rows that the model does not run on, or raise the error of the first."""
        for row in rows:
            self._bad_rows.report(*row)
            self._feed.leave_out(row.place)

    @property
    def _stored_unit_rows(self) -> int | None:
        """How many rows the units of the store have that the run goes on with."""
        return read_manifest(self._out).rows_per_unit if has_manifest(self._out) else None

    def _say_stopped(self, unit_rows: int) -> None:
        try:
            done = open_store(self._out, partial=True).rows
        except StoreError:  # a run that ended before its first unit left no store
            unit_rows = min(unit_rows, self._source.rows)
            told = f"Nothing is stored: the first {unit_rows:,} rows were not complete."
            warn(f"Stopped. {told} With smaller units, such as --rows-per-unit {max(1, unit_rows // 8)}, less is lost.")
            return
        warn(f"Stopped. {done:,} rows are in {str(self._out)!r}; the same command goes on from there.")


def _default_layers(model: nn.Module, sequence_axis: Any) -> list[str]:
    """The blocks of a model, without those whose sequence axis is not known, unless that is so of all."""
    names, layouts = blocks(model), Layouts(sequence_axis, unwrap(model))
    known = [target.layer for target in resolve(model, names) if layouts.of(target).doubt is None]
    left_out = [name for name in names if name not in known]
    if known and left_out:
        what = f"{plural(len(left_out), 'block')} left out ({examples(left_out)})"
        warn(f"{what}, as it is not known which axis is the sequence: name them with --layers and --sequence-axis.")
    return known or names


def read_share(text: str, *, resume: bool) -> tuple[int, int] | None:
    """What ``--share`` says, as ``share=`` of `extract` takes it.

    Raises:
        ArgumentError: it says something else, or ranks would each begin another store.
    """
    rank, slash, world = text.partition("/")
    if text not in ("auto", "none") and not (slash and rank.isdecimal() and world.isdecimal()):
        raise ArgumentError("share", "be auto, none, or R/N such as 0/4", text)
    part = share_of(text if text == "auto" else (int(rank), int(world)) if slash else None)
    if part is not None and not resume:
        advice = "Move the earlier store away, or pass --share none."
        raise ArgumentError("fresh", "be left out where processes share the work", f"{part.rank}/{part.world}", advice)
    return None if part is None else (part.rank, part.world)
