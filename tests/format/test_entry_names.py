"""The names of entries: safe on disk, never mixed up, and back as they went in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor._format._entry_names import (
    IDS,
    OFFSETS,
    ROWS,
    column_key,
    entry_name,
    escape,
    is_index,
    keep_entry,
    kept_name,
    unescape,
)

NAMES = st.text(st.characters(exclude_categories=[])) | st.text("%:#/\\\x0025F", max_size=12)


@settings(deadline=None, max_examples=40)
@given(NAMES)
def test_a_name_comes_back_from_its_escaped_form(name):
    escaped = escape(name)
    assert unescape(escaped) == name
    assert not set(escaped) & set(":#/\\\0")


@settings(deadline=None, max_examples=40)
@given(NAMES, NAMES, NAMES, NAMES)
def test_different_layers_and_reducers_have_different_entries(layer, reducer, other_layer, other_reducer):
    same = (layer, reducer) == (other_layer, other_reducer)
    assert (entry_name(layer, reducer) == entry_name(other_layer, other_reducer)) == same
    assert entry_name(layer).count(":") == 0


def test_an_entry_is_named_after_layer_and_reducer():
    assert entry_name("h.0") == "h.0"
    assert entry_name("h.0", "mean") == "h.0:mean"
    assert entry_name("h.0:input", "position(1)") == "h.0%3Ainput:position(1)"
    assert keep_entry("a:b") == "#keep:a%3Ab"


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a%b", "a%25b"),
        ("%3A", "%253A"),
        ("x#0", "x%230"),
        ("a/../b", "a%2F..%2Fb"),
        ("a\\b\0", "a%5Cb%00"),
        ("ü", "ü"),
    ],
)
def test_only_what_is_unsafe_is_escaped(name, escaped):
    assert escape(name) == escaped


@settings(deadline=None, max_examples=40)
@given(NAMES, NAMES)
def test_a_column_is_known_by_its_entry_and_by_no_other(layer, reducer):
    entry = entry_name(layer, reducer)
    assert column_key(entry) == (layer, reducer)
    assert kept_name(entry) is None
    assert not is_index(entry)
    assert all(is_index(entry + mark) and column_key(entry + mark) is None for mark in (OFFSETS, ROWS))


@settings(deadline=None, max_examples=40)
@given(NAMES)
def test_a_kept_column_is_known_by_its_entry_and_by_no_other(name):
    entry = keep_entry(name)
    assert kept_name(entry) == name
    assert column_key(entry) is None
    assert not is_index(entry)
    assert all(is_index(entry + mark) and kept_name(entry + mark) is None for mark in (OFFSETS, ROWS))


@pytest.mark.parametrize(
    "entry", [IDS, IDS + OFFSETS, "h.0", "", "a:b:c", "a:b#", "#keep", "keep:x#rows", "#:", "a%zz:b"]
)
def test_what_is_no_column_has_no_key(entry):
    assert column_key(entry) is None


@pytest.mark.parametrize("entry", [IDS, "h.0", "h.0:mean", "keep:x", "#keep", "#keep:%", "#keep:%zz", "#keep:x#rows"])
def test_what_is_no_kept_column_has_no_name(entry):
    assert kept_name(entry) is None


@pytest.mark.parametrize("entry", ["%41:mean", "a%3a:mean", "a:%6Dean", "a%+1:mean", "a/b:mean", "a\\b:mean", "a\0:b"])
def test_an_entry_that_a_writer_would_spell_otherwise_is_none(entry):
    assert column_key(entry) is None
    assert kept_name("#keep:" + entry.partition(":")[0] + "%41") is None
