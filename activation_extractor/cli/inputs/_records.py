"""The columns that are wanted of records: text, id, and those to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from activation_extractor._display import examples
from activation_extractor.errors import ArgumentError

_TEXT_COLUMNS = ("text", "sequence")  # where no column is named


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        text: of the text; None for ``text``, or else ``sequence``.
        id: of the row ids; None where rows are numbered.
        keep: those that are stored too.
    """

    text: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def named(self) -> list[str]:
        """Those that a user named."""
        return [name for name in (self.text, self.id, *self.keep) if name is not None]

    def text_of(self, names: Iterable[str]) -> str:
        """The column of the text among columns of these names."""
        return self.text or next((name for name in _TEXT_COLUMNS if name in names), "text")

    def among(self, names: Iterable[str]) -> list[str]:
        """The columns that are wanted, in the order text, id, kept."""
        return [self.text_of(names), *([] if self.id is None else [self.id]), *self.keep]

    def check(self, source: str, names: Sequence[str], where: str = "", advice: str = "") -> None:
        """Make sure that columns of these names hold each wanted one, once.

        Raises:
            ArgumentError: they do not.
        """
        arguments = ["text_column", *([] if self.id is None else ["id_column"]), *(["keep"] * len(self.keep))]
        for argument, name in zip(arguments, self.among(names), strict=True):
            if name not in names:
                advice = advice or (f"Its columns are {examples(names)}{where}." if names else "")
                raise ArgumentError(argument, f"name a column of {source!r}", name, advice)
            if list(names).count(name) > 1:
                advice = "It stands there more than once; rename one of them."
                raise ArgumentError(argument, f"name one column of {source!r}", name, advice)
