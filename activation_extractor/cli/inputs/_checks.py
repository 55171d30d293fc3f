"""What makes a row one that can be used."""

from __future__ import annotations

from typing import Any

from activation_extractor._display import plural
from activation_extractor.errors import ArgumentError, ArgumentTypeError

_ESCAPED = range(0xDC80, 0xDD00)  # what stands for a byte that is no text


def is_plain_text(text: Any) -> bool:
    """Whether this is text in ASCII that is not blank, as most is: asking that is quicker than all checks."""
    return type(text) is str and text.isascii() and not text.isspace() and text != ""


def check_text(text: Any, place: str) -> None:
    """Refuse a row without text, or with bytes in it that are none.

    Raises:
        ArgumentError: that is so.
    """
    if not isinstance(text, str):
        raise ArgumentTypeError(f"the text of {place}", "be text", text)
    if not text or text.isspace():
        raise ArgumentError(f"the text of {place}", "hold text", text, "Remove that row.")
    if not text.isascii():
        check_unicode(f"the text of {place}", text)


def check_id(row_id: Any, place: str) -> None:
    """Refuse an id that a store cannot have.

    Raises:
        ArgumentError: it is empty, or no text and no integer.
    """
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise ArgumentTypeError(f"the id of {place}", "be text or an integer", row_id)
    if isinstance(row_id, str):
        if not row_id or row_id.isspace():
            raise ArgumentError(f"the id of {place}", "hold text", row_id, "Give that row an id.")
        check_unicode(f"the id of {place}", row_id)


def check_cell(cell: Any, name: str, place: str) -> None:
    """Refuse a cell of a kept column that a store cannot have.

    Raises:
        ArgumentError: it holds bytes that are no text.
    """
    what = f"{name!r} of {place}"
    if isinstance(cell, bytes):
        try:
            cell.decode()
        except UnicodeDecodeError as error:
            raise ArgumentTypeError(what, "be text or a number", cell, "Leave that column out.") from error
    elif isinstance(cell, str) and not cell.isascii():
        check_unicode(what, cell)


def check_unicode(what: str, text: str) -> None:
    """Refuse text that holds halves of surrogate pairs, as bytes do that could not be decoded.

    Raises:
        ArgumentError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if code not in _ESCAPED:
            got = f"{text[error.start]!r} behind {plural(error.start, 'character')}"
            raise ArgumentError(what, "be Unicode without halves of surrogate pairs", got, "Repair it.") from None
        got = f"the byte {code - 0xDC00:#04x} behind {plural(error.start, 'character')}"
        advice = "Say what it is in: input_encoding='latin-1'."
        raise ArgumentError(what, "be text in the encoding that it is read in", got, advice) from None
