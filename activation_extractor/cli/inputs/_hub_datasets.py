"""Data sets of Hugging Face: a folder that `save_to_disk` wrote, or one of the hub, with a split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from activation_extractor._display import examples
from activation_extractor.cli.inputs._bad_rows import BadRows
from activation_extractor.cli.inputs._media import as_media_file, check_media, check_packages
from activation_extractor.cli.inputs._source import Kind, Reader, Row
from activation_extractor.errors import ArgumentError, MissingExtraError

# id:split, id:configuration:split, and perhaps a part of the split, such as [:10%]
_HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?:([\w.+-]+(?:\[[\d%:-]*\])?)")
_SAVED = ("state.json", "dataset_dict.json")  # files of a data set, and of several splits
_TEXTS = ("text", "sequence")  # columns, where none is named
_ROWS: dict[Kind, int] = {"text": 1000, "array": 32, "image": 32, "audio": 32}  # that are held at once


def is_hub_dataset(name: str) -> bool:
    """Whether an input is a folder of `save_to_disk`, with or without a split, or looks like an id with a split."""
    folder = name if Path(name).is_dir() else name.rpartition(":")[0]
    if folder and Path(folder).is_dir():
        return any(Path(folder, file).is_file() for file in _SAVED)
    return not Path(name).exists() and _HUB_ID.fullmatch(name) is not None and not re.match(r"[A-Za-z]:[\\/]", name)


class HubDatasetReader(Reader):
    """The rows of a split.

    Their values are in the column that is named, else in ``text`` or ``sequence``, else in the only one of images or
    sounds. Labels are kept by their names.
    """

    def __init__(self, name: str, column: str | None, id_column: str | None, keep: Sequence[str]) -> None:
        if find_spec("datasets") is None:
            raise MissingExtraError(f"The data set {name!r}", "datasets", "datasets")
        self._rows = _loaded(name)
        features = dict(self._rows.features or {})
        self._column, self._id_column = column or _default_column(name, features), id_column
        self.kept, self.has_ids = tuple(keep), id_column is not None
        wanted = {"text_column": [self._column], "id_column": [id_column] if id_column else [], "keep": list(keep)}
        for argument, names in wanted.items():
            for one in names:
                if one not in features:
                    raise ArgumentError(argument, f"name a column of {name!r}", one, f"It has {examples(features)}.")
        self.kind = _kind(features[self._column])
        check_packages(self.kind)
        self.unsigned = tuple(one for one in keep if getattr(features[one], "dtype", "") == "uint64")
        self._labels = {one: features[one] for one in keep if hasattr(features[one], "int2str")}
        if self.kind in ("image", "audio"):  # read by us: what `datasets` reads sounds with needs FFmpeg
            feature = type(features[self._column])(decode=False)
            self._rows = self._rows.cast_column(self._column, feature)
        self._rows = self._rows.select_columns(list(dict.fromkeys(one for names in wanted.values() for one in names)))

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """The wanted cells of each row."""
        number = 0
        for batch in self._rows.iter(batch_size=_ROWS[self.kind]):
            for index, value in enumerate(batch[self._column]):
                number += 1
                row_id = batch[self._id_column][index] if self._id_column else None
                kept = tuple(self._cell(name, batch[name][index]) for name in self.kept)
                row = Row(value, row_id, kept, f"row {number}")
                if self.kind in ("image", "audio"):
                    made = check_media(row, as_media_file(value, row.place), self.kind, bad_rows)
                    if made is not None:
                        yield made
                else:
                    yield row._replace(value=np.asarray(value)) if self.kind == "array" else row

    def _cell(self, name: str, cell: Any) -> Any:
        labels = self._labels.get(name)
        if labels is None or cell is None:
            return cell
        return labels.int2str(cell) if cell >= 0 else None  # -1 is for rows without a label


def _loaded(name: str) -> Any:
    """A split, of a folder or from the hub."""
    import datasets

    folder, _, split = (name, "", "") if Path(name).is_dir() else name.rpartition(":")
    hub = None if folder and Path(folder).is_dir() else _HUB_ID.fullmatch(name)
    try:
        if hub is not None:
            return datasets.load_dataset(hub[1], hub[2], split=hub[3])
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # of the hub, the network, the files
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        condition = "be a data set that can be loaded, with a split, as owner/name:train"
        raise ArgumentError("input", condition, name, f"{reason}.") from error
    if not isinstance(loaded, dict):
        if split and folder and Path(folder).is_dir():
            raise ArgumentError("input", "be named without a split, as it has none", name, f"Pass {folder!r}.")
        return loaded
    if split not in loaded:
        advice = f"Pass {f'{folder}:{next(iter(loaded))}'!r}; it has {examples(loaded)}."
        raise ArgumentError("input", "name a split of the data set", name, advice)
    return loaded[split]


def _default_column(name: str, features: dict[str, Any]) -> str:
    for column in _TEXTS:
        if column in features:
            return column
    media = [column for column, feature in features.items() if type(feature).__name__ in ("Image", "Audio")]
    if len(media) != 1:
        advice = f"It has {examples(features)}."
        raise ArgumentError("text_column", f"name a column of {name!r}", None, advice)
    return media[0]


def _kind(feature: Any) -> Kind:
    kinds: dict[str, Kind] = {"Image": "image", "Audio": "audio"}
    if "string" in str(getattr(feature, "dtype", "")):
        return "text"
    is_nested = isinstance(feature, list | dict) or type(feature).__name__ in ("List", "LargeList", "Sequence")
    return kinds.get(type(feature).__name__, "array" if is_nested or hasattr(feature, "shape") else "text")
