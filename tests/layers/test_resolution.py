"""How names are resolved, beside the simplest way: look at every module, and pick.

What stands here as the simple way is how it was first done. It visits the whole model for each name.
"""

from __future__ import annotations

import gc
import re
import weakref
from difflib import get_close_matches

from hypothesis import given, settings
from hypothesis import strategies as st
from models import BlockStack
from torch import nn

from activation_extractor._private_torch import has_forward
from activation_extractor.errors import LayerNotFoundError, UnhookableLayerError
from activation_extractor.layers._modules import WRAPPER_SEGMENTS, check_hookable, check_model
from activation_extractor.layers._patterns import glob
from activation_extractor.layers._selections import resolve

PLACES = ["a", "b", "0", "module", "_orig_mod", "_fsdp_wrapped_module"]
SEGMENTS = [*PLACES, "c", "*", "?", "**", "[ab]"]


class Runs(nn.Module):
    """An ordinary module; under some of the names that its children are given here it is a wrapper."""

    def forward(self, x):
        return x


class Parallel(nn.DataParallel):
    """A DataParallel that is made without a look at the machine's devices."""

    def __init__(self, devices: int) -> None:
        nn.Module.__init__(self)
        self.device_ids = list(range(devices))


@st.composite
def models(draw, devices=(1,)):
    """A model whose modules are tied, missing, wrapped and wrappers at random, and a module that is not in it."""
    made = [Runs()]
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from([Runs, nn.Module, nn.ModuleList, Parallel]))
        parent = Parallel(draw(st.sampled_from(devices))) if parent is Parallel else parent()
        for place in draw(st.lists(st.sampled_from(PLACES), max_size=3, unique=True)):
            setattr(parent, place, draw(st.sampled_from([*made, None])))
        if isinstance(parent, Parallel) and parent._modules.get("module") is None:
            parent.module = draw(st.sampled_from(made))
        made.append(parent)
    return made[-1], made


def walk(module, full_name="", name="", around=()):
    """Full name, plain name, module, and the modules around it, of every module; the inner ones come later."""
    around = (*around, module)
    yield full_name, name, module, around
    children = module._modules.items()
    wrapped = next((place for place, _ in children if place in WRAPPER_SEGMENTS), None)
    wrapped = "module" if isinstance(module, nn.DataParallel) else wrapped
    for place, child in children:
        if child is not None:
            inner_name = name if place == wrapped else joined(name, place)
            yield from walk(child, joined(full_name, place), inner_name, around)


def joined(name, place):
    return f"{name}.{place}" if name else place


def simply_resolved(model, selection):
    """The plain names and modules that a selection means, in order; the errors are those of `resolve`."""
    entries = list(walk(model))
    modules = {name: module for _, name, module, _ in entries}
    around = {name: modules_around for _, name, _, modules_around in entries}
    plain_names = {full_name: name for full_name, name, _, _ in entries}
    names = picked(modules, plain_names, entries, selection)
    if not names:
        text = selection.pattern if isinstance(selection, re.Pattern) else selection
        matches = get_close_matches(text, filter(None, modules), n=3) if isinstance(text, str) else []
        raise LayerNotFoundError(getattr(selection, "__qualname__", selection), matches)
    for name in names:
        if any(len(getattr(module, "device_ids", ())) > 1 for module in around[name]):
            raise UnhookableLayerError(name, "DataParallel", "")
        check_hookable(name, modules[name])
    return [(name, modules[name]) for name in names]


def picked(modules, plain_names, entries, selection):
    if isinstance(selection, nn.Module):
        return list(dict.fromkeys(name for _, name, module, _ in entries if module is selection))
    matches = selection
    if isinstance(selection, str):
        plain = ".".join(segment for segment in selection.split(".") if segment not in WRAPPER_SEGMENTS)
        exact = next((one for one in (selection, plain_names.get(selection), plain) if one in modules), None)
        if exact is not None or not set("*?[") & set(selection):
            return [] if exact is None else [exact]
        matches = fits(glob(plain))
    elif isinstance(selection, re.Pattern):
        matches = fits(selection)
    elif isinstance(selection, type):
        matches = is_a(selection)
    found = described({name: name for name in modules}, modules, matches)
    text = selection.pattern if isinstance(selection, re.Pattern) else selection
    names_wrappers = isinstance(text, str) and any(word in text for word in ("module", *WRAPPER_SEGMENTS))
    return described(plain_names, modules, matches) if not found and names_wrappers else found


def described(plain_names, modules, matches):
    names = (
        name
        for given_name, name in plain_names.items()
        if name and has_forward(modules[name]) and matches(given_name, modules[name])
    )
    return list(dict.fromkeys(names))


def fits(pattern):
    return lambda name, module: pattern.fullmatch(name) is not None


def is_a(kind):
    return lambda name, module: isinstance(module, kind)


def outcome(find, model, selection):
    """What is found, or what is refused and why."""
    try:
        return find(model, selection)
    except LayerNotFoundError as error:
        return type(error), error.close_matches
    except UnhookableLayerError as error:
        return (type(error), "DataParallel") if "DataParallel" in str(error) else (type(error), str(error))


def resolved(model, selection):
    return [(target.layer, target.module) for target in resolve(model, selection)]


def dotted(segments):
    return ".".join(segments)


def names_of_some(model):
    """Names that are there, full and plain, and names that may not be."""
    entries = list(walk(model))
    there = st.sampled_from([name for full_name, name, _, _ in entries for name in (full_name, name)])
    more = st.lists(st.sampled_from(SEGMENTS), max_size=4).map(dotted)
    return st.one_of(there, more, st.tuples(more, there, more).map(lambda parts: dotted(filter(None, parts))))


@settings(deadline=None, max_examples=400)
@given(models(), st.data())
def test_a_name_or_pattern_means_what_a_look_at_every_module_gives(made, data):
    model, _ = made
    for name in data.draw(st.lists(names_of_some(model), min_size=1, max_size=8)):
        assert outcome(resolved, model, name) == outcome(simply_resolved, model, name), name


@settings(deadline=None, max_examples=200)
@given(models(), st.sampled_from([".*", r"a(\..*)?", r".*\.b", "_orig_mod.*", r"(.*\.)?module(\..*)?", ".*[.]0"]))
def test_a_regex_speaks_of_plain_names_or_else_of_full_ones(made, regex):
    model, _ = made
    pattern = re.compile(regex)
    assert outcome(resolved, model, pattern) == outcome(simply_resolved, model, pattern)


@settings(deadline=None, max_examples=200)
@given(models())
def test_modules_and_types_are_found_under_each_of_their_names(made):
    model, modules = made
    for selection in (*modules, Runs(), Runs, nn.Module, nn.DataParallel, nn.Linear):
        assert outcome(resolved, model, selection) == outcome(simply_resolved, model, selection)


@settings(deadline=None, max_examples=200)
@given(models())
def test_a_predicate_is_asked_about_each_layer_that_runs_once_and_in_order(made):
    model, _ = made
    asked: dict[str, list[tuple[str, nn.Module]]] = {"ours": [], "simple": []}

    def noting(by):
        def has_a_short_name(name, module):
            asked[by].append((name, module))
            return len(name) < 4

        return has_a_short_name

    assert outcome(resolved, model, noting("ours")) == outcome(simply_resolved, model, noting("simple"))
    assert asked["ours"] == asked["simple"]


@settings(deadline=None, max_examples=400)
@given(models(devices=(0, 1, 2)), st.data())
def test_what_lies_in_a_data_parallel_over_devices_is_refused_and_nothing_else(made, data):
    model, modules = made
    selection = data.draw(st.one_of(names_of_some(model), st.sampled_from([*modules, Runs, nn.Module])))
    assert outcome(resolved, model, selection) == outcome(simply_resolved, model, selection)
    assert outcome(checked, model, "") == outcome(checked_simply, model, "")


def test_what_was_looked_at_is_let_go_of_without_garbage_collection():
    model = BlockStack()
    held = weakref.ref(model)
    gc.disable()
    try:
        resolve(nn.DataParallel(model), ["h.0", re.compile(r"module\.h\.1"), nn.Linear, model.embed])
        del model
        assert held() is None
    finally:
        gc.enable()


def checked(model, selection):
    check_model(model)


def checked_simply(model, selection):
    root_around = [around for _, name, _, around in walk(model) if not name][-1]
    if any(len(getattr(module, "device_ids", ())) > 1 for module in root_around):
        raise UnhookableLayerError("", "DataParallel", "")
