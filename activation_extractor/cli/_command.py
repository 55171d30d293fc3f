"""A command, whose errors name options where the library's name arguments of functions."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand

from activation_extractor.cli._terminal import warn
from activation_extractor.errors import ActivationError, ArgumentError

_IN_OPTIONS = {
    "mask (entry 'pooling_mask' in place of 'attention_mask')": "--skip-special-tokens (left out before)",
    "mask ('attention_mask' in place of entry 'pooling_mask')": "--skip-special-tokens (left out now)",
    "left out with pooling_mask": "left out with --skip-special-tokens",
    "ids ('id' in place of none)": "--id-column (left out before)",
    "ids (none in place of 'id')": "--id-column (left out now)",
    "order ('row' in place of none)": "the order of rows in batches",
    "order (none in place of 'row')": "the order of rows in batches",
    "Use the sink or format= that": "Use the --format that",
    "Ask for it with reduce=.": "Extract it with --reduce first.",
    "Give the folder that was given as out= or sink=.": "Give the folder that extract wrote.",
    "match='order'": "--by-order",
    "with a dict": "with --match",
    "Choose other columns by keys": "Choose other columns by --layers and --reduce",
    "Run verify()": "Run `activation-extractor verify`",
    "`[name for name, _ in model.named_modules()]`": "`activation-extractor layers`",
}
_QUOTED = r"(?<!\w)'[^']*'"  # what the user typed; an apostrophe within a word quotes nothing
_ARGUMENT = re.compile(rf"{_QUOTED}|\b([a-z_]+)=(\w+|'[^']*'|\([^)]*\))?(?=[\s.,;:)]|$)|\b([a-z]+(?:_[a-z]+)+)\b")
_MASK = re.compile(r"\bmask=\{'([^']*)': (None|'[^']*')\}")
_AXIS = re.compile(r"\bsequence_axis=\{('[^']*'): (\d)\}")
_PYTHON = re.compile(rf"{_QUOTED}|\b([a-z_]+=)")


class Command(TyperCommand):
    """A command; an error of the library is one text on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; modules in the current directory that a model imports can be imported until it ends."""
        path = list(sys.path)
        try:
            return super().invoke(ctx)
        except ActivationError as error:
            warn(in_options(error, self.params))
            raise typer.Exit(2) from error
        finally:
            sys.path[:] = path


def in_options(error: ActivationError, parameters: Iterable[Any]) -> str:
    """The text of an error with a command's options in place of arguments, without advice that only Python can follow.

    The parameters are the command's, as click has them.
    """
    options = {parameter.name: parameter for parameter in parameters}
    text = str(error)
    if isinstance(error, ArgumentError) and text.startswith(error.argument):
        where, preposition, name = error.argument.rpartition(" in ")  # as "a pattern in rtol"
        if name in options:
            text = f"{where}{preposition}{_named(options[name])}{text[len(error.argument) :]}"
    if "mask" in options:
        text = _AXIS.sub(r"--sequence-axis \2 with --layers \1 alone", text)
        text = _MASK.sub(_as_mask, text)
    for python, replacement in _IN_OPTIONS.items():
        text = text.replace(python, replacement)

    def option(found: re.Match[str]) -> str:
        parameter = options.get(found[1] or found[3])
        return found[0] if parameter is None else _named(parameter, found[2])

    first, *advice = re.split(r"(?<=\.) (?=[A-Z`])", _ARGUMENT.sub(option, text))
    return " ".join([first, *filter(None, map(_without_python, advice))])


def _named(parameter: Any, value: str | None = None) -> str:
    """A parameter as a user types it, with a value that Python code gives it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    if getattr(parameter, "is_flag", False):
        return str((parameter.secondary_opts if value == "False" else parameter.opts)[0])
    return f"{parameter.opts[0]} {_plain(value)}" if value else str(parameter.opts[0])


def _as_mask(found: re.Match[str]) -> str:
    quote = "'"
    return f"--mask '{found[1]}={_plain(found[2]).strip(quote)}'"


def _plain(value: str) -> str:
    """A value of Python as it is typed."""
    return "none" if value == "None" else value


def _without_python(sentence: str) -> str:
    """A sentence of advice without the alternatives that name arguments, which no option stands for."""
    alternatives = re.split(r",? or ", sentence)
    kept = [alternative for alternative in alternatives if not any(_PYTHON.findall(alternative))]
    if len(kept) == len(alternatives):
        return sentence
    text = " or ".join(kept).rstrip(".")
    text = f"{sentence.split()[0]} {text}" if text.startswith("--") else text  # the verb was in an alternative before
    return text and f"{text[0].upper()}{text[1:]}."
