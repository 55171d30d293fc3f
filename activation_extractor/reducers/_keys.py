"""How activations and stores are indexed: by layer and reducer, or by layer alone when there is one reducer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from activation_extractor._display import close_matches, examples
from activation_extractor.errors import ActivationNotFoundError
from activation_extractor.reducers._reducers import canonical_name

EntryKey = str | tuple[str, str]


def resolve_key(key: Any, names: Collection[str], reducers: Sequence[str]) -> tuple[str, str]:
    """The ``(name, reducer)`` that a user's key means.

    Raises:
        ActivationNotFoundError: it names what is not recorded, or no reducer where there are several.
    """
    name, reducer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
    if not isinstance(name, str) or name not in names:
        text = f"There is {examples(names)}." if names else "Nothing has been recorded yet, or it was cleared."
        text = close_matches(name, names, text)
        raise ActivationNotFoundError(key, f"Nothing is recorded under {name!r}. {text}")
    if reducer is None and len(reducers) > 1:
        text = f"A key must say which reducer is meant ({examples(reducers)}), got {key!r}. "
        raise ActivationNotFoundError(key, text + f"Write [{name!r}, {reducers[0]!r}].")
    reducer = reducers[0] if reducer is None else reducer
    if reducer not in reducers:
        reducer = canonical_name(reducer)
    if reducer not in reducers:
        text = f"A reducer in a key must be one of {examples(reducers)}, got {reducer!r}."
        raise ActivationNotFoundError(key, f"{text} Ask for it with reduce=.")
    return name, str(reducer)


def pair_of(key: Any, reducers: Sequence[str]) -> tuple[str, str] | None:
    """The ``(name, reducer)`` that a key means whose name is recorded; None where it means none. It lists no names."""
    name, reducer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
    if reducer is None and len(reducers) == 1:
        reducer = reducers[0]
    reducer = reducer if reducer in reducers else canonical_name(reducer)
    return (name, str(reducer)) if isinstance(name, str) and reducer in reducers else None


def entry_keys(names: Iterable[str], reducers: Sequence[str]) -> list[EntryKey]:
    """The keys that iteration gives."""
    if len(reducers) == 1:
        return list(names)
    return [(name, reducer) for name in names for reducer in reducers]


def pairs_of(keys: Iterable[EntryKey], reducers: Sequence[str]) -> list[tuple[str, str]]:
    """The name and reducer of each key."""
    return [key if isinstance(key, tuple) else (key, reducers[0]) for key in keys]
