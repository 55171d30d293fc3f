"""What a command makes of the library's errors: options in place of arguments, and only advice that can be followed."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the extra 'cli' is not installed")

from typer.main import get_command

from activation_extractor import errors
from activation_extractor.cli._app import app
from activation_extractor.cli._command import in_options
from activation_extractor.errors import ArgumentError, MaskError, MatchError, StoreError

COMMANDS = get_command(app).commands


def told(command: str, error: errors.ActivationError) -> str:
    return in_options(error, COMMANDS[command].params)


@pytest.mark.parametrize(
    ("command", "argument", "expected"),
    [
        ("compare", "rtol", "--rtol"),
        ("compare", "a pattern in rtol", "a pattern in --rtol"),
        ("compare", "left", "LEFT"),
        ("extract", "model", "--model"),
        ("extract", "the model", "the model"),
        ("extract", "max_length", "--max-length"),
        ("extract", "batch_size or max_tokens", "--batch-size or --max-tokens"),
        ("layers", "model", "MODEL"),
        ("show", "rtol", "rtol"),
    ],
)
def test_an_argument_is_named_as_its_option(command, argument, expected):
    assert told(command, ArgumentError(argument, "be finite", "rtol=3")) == f"{expected} must be finite, got 'rtol=3'."


def test_what_the_user_typed_is_left_as_it_is():
    error = ArgumentError("input", "be a file", "max_tokens/keep=x", "It is the model's max_tokens 'keep=1'.")
    expected = "--input must be a file, got 'max_tokens/keep=x'. It is the model's --max-tokens 'keep=1'."
    assert told("extract", error) == expected


def test_advice_that_only_python_can_follow_is_left_out():
    for advice, expected in {
        "Leave empty rows out, or pass mask=None.": " Leave empty rows out, or pass --mask none.",
        "Pass mask=None if all is real, or mask=callable(layer, activation).": " Pass --mask none if all is real.",
        "Pass mask={'encoder.**': None} if not, or mask={'encoder.**': 'x'}.": (
            " Pass --mask 'encoder.**=none' if not, or --mask 'encoder.**=x'."
        ),
        "Choose outputs(..., select=) or inputs(..., select=), or leave the layer out.": " Leave the layer out.",
        "Pass mask=None, or reduce='full'.": " Pass --mask none, or --reduce 'full'.",
        "Pass sequence_axis= (for images (2, 3)).": " Pass --sequence-axis (for images (2, 3)).",
        "Pass sequence_axis={'h.0': 2}, or 1 where it is last.": (
            " Pass --sequence-axis 2 with --layers 'h.0' alone, or 1 where it is last."
        ),
        "Make room, choose another disk, or go.": " Make room, choose another disk, or go.",
    }.items():
        error = MaskError("fit", "3", advice, "h.0")
        assert told("extract", error) == f"The mask for layer 'h.0' must fit, got 3.{expected}"


def test_flags_are_named_by_what_they_say():
    advice = "Leave out resume=False, or stop_early=True."
    expected = "'out' must be new, got old. Leave out --fresh, or --stop-early."
    assert told("extract", StoreError("out", "be new", "old", advice)) == expected
    error = MatchError("have equally many layers for match='order'", "2 and 3", "Match them by name, with a dict.")
    assert told("compare", error) == (
        "What is compared must have equally many layers for --by-order, got 2 and 3. Match them by name, with --match."
    )


def test_other_forms_of_python_have_a_replacement_that_the_librarys_own_texts_reach():
    error = errors.LayerNotFoundError("h.*")
    assert told("extract", error) == "No layer matches 'h.*'. `activation-extractor layers` lists what there is."
    error = errors.LayerNotRunError(["h.0"])
    assert told("extract", error).endswith(" Leave out what does not run.")


def test_an_error_that_no_command_expects_is_not_hidden(monkeypatch):
    from commands import CliRunner

    monkeypatch.setattr("activation_extractor.store.open_store", lambda *_, **__: 1 / 0)
    assert isinstance(CliRunner().invoke(app, ["show", "out"]).exception, ZeroDivisionError)
