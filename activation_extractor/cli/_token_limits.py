"""How many tokens a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from activation_extractor.errors import ArgumentError

NO_LIMIT = 10**9  # a tokenizer without a limit has a `model_max_length` beyond this

_TABLES = {"position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe"}
_TABLES |= {"pos_embedding", "pos_embeddings", "pos_emb", "distance_embedding"}
_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech")  # their tables are not of tokens
_CONFIGURED = ("max_position_embeddings", "max_seq_len")


def token_limit(model: nn.Module, tokenizer: Any, max_length: int | None = None, name: str = "max_length") -> int:
    """How many tokens a row may have, special ones counted: `max_length`, or what the model was trained for.

    Errors call `max_length` by a `name`.

    The lengths that a configuration and a tokenizer name are a default. Only a table of learned positions limits what a
    model can be given; rotary, relative and ALiBi positions go on.

    Raises:
        ArgumentError: `max_length` is beyond the table, or has no room for a token beside special ones.
    """
    config = next((module.config for module in model.modules() if hasattr(module, "config")), None)
    configured = [_number(config, entry) for entry in _CONFIGURED]
    most = min((_room(kind, table, configured[0]) for kind, table in position_tables(model)), default=NO_LIMIT)
    special = getattr(tokenizer, "num_special_tokens_to_add", int)()
    if max_length is not None and not 0 < max_length <= most:
        condition = f"be from 1 to the {most} tokens that the model takes" if most < NO_LIMIT else "be positive"
        raise ArgumentError(name, condition, max_length)
    if max_length is not None and max_length <= special:
        advice = f"The tokenizer adds {special} of its own to each text."
        raise ArgumentError(name, "have room for a token of the text", max_length, advice)
    return max_length or min(most, _number(tokenizer, "model_max_length"), *configured)


def position_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a row for each position of a text, by their names."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        is_of_text = name in _TABLES and not any(sense in path for sense in _OTHER_SENSES)
        grows = hasattr(module, "make_weight")  # FSMT's
        if is_of_text and not grows and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            yield name, module


def counts_positions(model: nn.Module) -> bool:
    """Whether a model counts positions from the first column on: by tables, learned or of sines."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return bool(names & (_TABLES - {"distance_embedding"})) or hasattr(model, "pos_encoding")  # the latter is CTRL's


def _room(name: str, table: Any, configured: int) -> int:
    """How many positions a table has room for."""
    rows = int(table.weight.shape[0])
    if name == "distance_embedding":  # from -(positions - 1) to positions - 1
        return (rows + 1) // 2
    padding = getattr(table, "padding_idx", None)
    before = getattr(table, "offset", 0) if padding is None else padding + 1  # rows that no position uses
    return min(rows - int(before), configured)


def _number(holder: Any, name: str) -> int:
    value = getattr(holder, name, None)
    return value if isinstance(value, int) and 0 < value < NO_LIMIT else NO_LIMIT
