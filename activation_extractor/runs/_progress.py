"""A progress bar over batches, from tqdm."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator
from typing import Any

from activation_extractor._display import human_bytes
from activation_extractor.errors import ArgumentTypeError, MissingExtraError


class Progress:
    """Iterates over batches and shows how far it is; `is_shown` None shows a bar if tqdm is installed.

    The bar is of rows where the batches say how many there are, by an attribute `total_rows`; else of batches. Batches
    with an attribute `is_quiet` that is true show none by themselves.

    Raises:
        MissingExtraError: a bar is asked for and tqdm is not installed.
    """

    def __init__(self, batches: Iterable[Any], is_shown: bool | None) -> None:
        if is_shown is not None and not isinstance(is_shown, bool):
            raise ArgumentTypeError("progress", "be True, False or None", is_shown)
        has_tqdm = importlib.util.find_spec("tqdm") is not None
        if is_shown and not has_tqdm:
            raise MissingExtraError("progress=True", "cli", "tqdm")
        self._batches, self._total_rows = batches, getattr(batches, "total_rows", None)
        self._bar: Any = None
        is_wanted = has_tqdm and not getattr(batches, "is_quiet", False)
        self._is_shown = is_wanted if is_shown is None else is_shown
        self._start = time.monotonic()  # later, when stored rows come first: the rate is of those computed

    def __iter__(self) -> Iterator[Any]:
        if not self._is_shown:
            return iter(self._batches)
        from tqdm.auto import tqdm

        if self._total_rows is None:
            self._bar = tqdm(self._batches, unit="batch", dynamic_ncols=True)
            return iter(self._bar)
        self._bar = tqdm(total=self._total_rows, unit="row", dynamic_ncols=True)
        return self._counting()

    def _counting(self) -> Iterator[Any]:
        with self._bar:
            yield from self._batches

    def show(self, stored_rows: int, rows: int, nbytes: int) -> None:
        """Show the rows so far, how many of them an earlier run stored, rows computed per second, and their bytes."""
        if self._bar is None:
            return
        now = time.monotonic()
        if not rows:
            self._start = now
        seconds = now - self._start
        earlier = f" ({stored_rows} from earlier)" if stored_rows else ""
        rate = f"{rows / seconds:.0f} rows/s, " if seconds > 0 else ""
        self._bar.set_postfix_str(f"{stored_rows + rows} rows{earlier}, {rate}{human_bytes(nbytes)}", refresh=False)
        if self._total_rows is not None:
            self._bar.update(stored_rows + rows - self._bar.n)
