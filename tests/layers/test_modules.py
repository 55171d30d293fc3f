"""Models in wrappers, and modules that hooks cannot reach."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from models import Block, BlockStack
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from activation_extractor import capture, inputs
from activation_extractor._private_torch import has_forward
from activation_extractor.errors import ArgumentTypeError, DuplicateLayerError, LayerNotFoundError, UnhookableLayerError
from activation_extractor.layers._modules import ModuleTree, check_model, unwrap
from activation_extractor.layers._selections import resolve


class FullyShared(nn.Module):
    """Keeps what it wraps as FSDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


class Unread(dict):
    """Children of a module that nobody may look at."""

    def __len__(self):
        raise AssertionError("looked at")

    keys = items = values = __iter__ = __len__


def distributed_data_parallel(module: nn.Module) -> nn.Module:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        return nn.parallel.DistributedDataParallel(module)
    finally:
        distributed.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "module": nn.DataParallel,
    "_fsdp_wrapped_module": FullyShared,
    "_checkpoint_wrapped_module": checkpoint_wrapper,
    "_orig_mod": compiled,
}


def modules(model: nn.Module, layers: object) -> list[nn.Module]:
    return [target.module for target in resolve(model, layers)]


@pytest.mark.parametrize("segment", WRAPPERS)
@pytest.mark.parametrize("layers", ["h.1", "h.[1]", "**.1"])
def test_the_prefix_of_a_wrapped_model_may_be_left_out_or_given(stack, segment, layers):
    wrapped = WRAPPERS[segment](stack)
    assert modules(wrapped, layers) == [stack.h[1]]
    (given,) = resolve(wrapped, f"{segment}.{layers}")
    assert (given.name, given.module) == ("h.1", stack.h[1])


@pytest.mark.parametrize("segment", WRAPPERS)
def test_the_segment_of_a_wrapped_layer_may_be_left_out_or_given(stack, segment):
    block = stack.h[1]
    stack.h[1] = WRAPPERS[segment](block)
    for name in ("h.1", f"h.1.{segment}"):
        (target,) = resolve(stack, name)
        assert (target.name, target.module) == ("h.1", block)
    for name in ("h.1.mlp", f"h.1.{segment}.mlp"):
        assert modules(stack, name) == [block.mlp]
    assert resolve(stack, stack.h[1])[0].module is block  # the wrapper stands for what it wraps


def test_names_of_distributed_data_parallel_are_those_of_the_plain_model(stack):
    wrapped = distributed_data_parallel(stack)
    assert [target.name for target in resolve(wrapped, "**")] == [target.name for target in resolve(stack, "**")]
    assert modules(wrapped, "module.h.1") == modules(wrapped, "h.1") == [stack.h[1]]


def test_wrappers_in_wrappers_come_off(stack):
    wrapped = nn.DataParallel(FullyShared(checkpoint_wrapper(stack)))
    assert unwrap(wrapped) is stack
    assert ModuleTree(wrapped).modules[""] is stack
    assert modules(wrapped, "module._fsdp_wrapped_module._checkpoint_wrapped_module.h.1") == [stack.h[1]]


@pytest.mark.parametrize("segment", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrapper_segment_may_be_given_for_a_model_that_is_not_wrapped(stack, segment):
    for layers in (f"{segment}.h.1", f"h.1.{segment}", f"{segment}.h.[1]"):
        assert modules(stack, layers) == [stack.h[1]]


@pytest.mark.parametrize("layers", ["h.*.*", lambda name, module: name.count(".") == 2])
def test_a_pattern_selects_the_same_layers_with_and_without_wrappers(layers):
    wrapped = BlockStack()
    for index in range(4):
        wrapped.h[index] = checkpoint_wrapper(wrapped.h[index])
    assert {target.name for target in resolve(wrapped, layers)} == {
        target.name for target in resolve(BlockStack(), layers)
    }


@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
@pytest.mark.parametrize("segment", WRAPPERS)
@torch.no_grad()
def test_a_wrapped_model_is_captured_under_plain_names(stack, tokens, segment):
    with capture(stack, "h.*") as plain:
        expected = stack(tokens)
    wrapped = WRAPPERS[segment](stack)
    with capture(wrapped, "h.*") as acts:
        assert torch.equal(wrapped(tokens), expected)
    assert list(acts) == list(plain)
    assert all(torch.equal(acts[name], plain[name]) for name in plain)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.* is compiled, and runs eagerly")
def test_a_compiled_layer_is_captured_under_its_plain_name_also_after_it_ran(stack, tokens):
    with capture(stack, ["h.1", "h.1.mlp"]) as plain:
        stack(tokens)
    stack.h[1] = compiled(stack.h[1])
    stack(tokens)
    with capture(stack, ["h.1", "h.1.mlp"]) as acts:
        stack(tokens)
    assert all(torch.equal(acts[name], plain[name]) for name in ("h.1", "h.1.mlp"))


def test_a_regex_over_full_names_leaves_out_the_root_and_what_has_no_forward(stack):
    assert modules(nn.DataParallel(stack), re.compile(r"module(\.[a-z]+)?")) == [stack.embed]  # and not h


def test_a_layer_that_fits_under_two_full_names_is_one_layer():
    model = nn.DataParallel(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))))
    (target,) = resolve(model, {"mine": re.compile(r"module\.0.*")})
    assert (target.name, target.layer) == ("mine", "0")


@pytest.mark.parametrize("wraps_last", [True, False])
def test_of_a_name_in_a_wrapper_and_in_what_it_wraps_the_later_layer_counts(wraps_last):
    wrapper, inner, outer = nn.Identity(), nn.Sequential(nn.Identity()), nn.Identity()
    for segment, child in [("0", outer), ("_orig_mod", inner)][:: 1 if wraps_last else -1]:
        wrapper.add_module(segment, child)
    expected = inner[0] if wraps_last else outer
    assert modules(wrapper, "0") == modules(wrapper, re.compile("0")) == [expected]


def test_a_child_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(2, 2))
    assert unwrap(model) is model
    assert list(ModuleTree(model).modules) == ["", "module", "module.0"]


def test_a_pattern_finds_a_child_called_module_of_a_wrapped_model():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert modules(nn.DataParallel(model), "*") == modules(nn.DataParallel(model), nn.Linear) == [model.module]


def test_tied_modules_are_reachable_under_each_of_their_names(tokens):
    model = BlockStack(2)
    model.h[1] = model.alias = model.h[0]
    for name in ("h.0", "h.1", "alias"):
        (target,) = resolve(model, name)
        assert (target.name, target.module) == (name, model.h[0])
    assert [target.name for target in resolve(model, Block)] == ["h.0", "h.1", "alias"]
    assert [target.name for target in resolve(model, model.h[0])] == ["h.0", "h.1", "alias"]
    assert modules(model, "alias.mlp") == [model.h[0].mlp]
    with pytest.raises(DuplicateLayerError, match="got 'mine' twice"):
        resolve(model, [{"mine": "h.0"}, {"mine": "alias"}])


def test_a_place_without_a_module_is_no_layer(stack):
    stack.head = None
    stack.h[1].mlp = None
    assert not {"head", "h.1.mlp"} & ModuleTree(stack).modules.keys()
    with pytest.raises(LayerNotFoundError):
        resolve(stack, "h.1.mlp")


def test_a_name_of_its_own_may_hold_a_dot(stack):
    setattr(stack.h[1], "in.out", nn.Sequential(nn.Identity()))
    for name in ("h.1.in.out", "h.1.in.out.0"):
        (target,) = resolve(stack, name)
        assert target.name == name


@pytest.mark.parametrize("segment", ["", *WRAPPERS])
def test_names_are_found_without_a_look_at_the_rest_of_the_model(stack, segment, monkeypatch):
    model = nn.Sequential(WRAPPERS[segment](stack) if segment else stack)
    monkeypatch.setattr(stack.embed, "_modules", Unread())
    names = ["0.h.1", "0.h.3.mlp", f"0.{segment}.h.2" if segment else "0.h.2", {"mine": inputs("0.h.1.norm")}]
    found = [target.layer for target in resolve(check_model(model), names)]
    assert found == ["0.h.1", "0.h.3.mlp", "0.h.2", "0.h.1.norm"]
    for look in (lambda: resolve(model, "**"), lambda: list(model.modules())):
        with pytest.raises(AssertionError, match="looked at"):
            look()


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_module_list_is_refused_and_its_advice_works(stack):
    with pytest.raises(UnhookableLayerError) as caught:
        resolve(stack, "h")
    assert str(caught.value) == (
        "Layer 'h' must be an ordinary module that runs, got a ModuleList, which has no forward of its own. "
        "Select what is in it: 'h.*'."
    )
    assert modules(stack, "h.*") == list(stack.h)


def test_a_root_without_a_forward_is_refused():
    model = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnhookableLayerError, match=r"got a ModuleList, .+\. Select its layers\.$"):
        resolve(model, "")
    assert modules(model, "0") == [model[0]]


@pytest.mark.parametrize("place", ["", "0", "**"])
def test_a_script_module_is_refused_with_advice(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(UnhookableLayerError, match=r"got a TorchScript module.+\. Capture the Python model\.$"):
        resolve(nn.Sequential(scripted) if place else scripted, place)


def test_layers_beside_a_script_module_can_be_named_even_so():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    assert modules(model, "0") == [model[0]]


@pytest.mark.parametrize(("given", "shown"), [(None, "None"), ("gpt2", "'gpt2'")])
def test_what_is_no_model_is_refused(given, shown):
    with pytest.raises(ArgumentTypeError) as caught:
        check_model(given)
    text = f"model must be a torch.nn.Module or a function that returns one, got {shown}. Load the model first."
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Sequential(), True),
        (nn.ModuleList(), False),
        (nn.ModuleDict(), False),
        (nn.ParameterList(), False),
        (nn.Module(), False),
    ],
)
def test_a_module_runs_if_it_has_a_forward(module, expected):
    assert has_forward(module) is expected


def test_a_forward_set_on_the_instance_counts():
    module = nn.Module()
    module.forward = lambda x: x
    assert has_forward(module)


def test_a_part_of_an_exported_program_holds_no_layer_and_the_error_says_so():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    with pytest.raises(UnhookableLayerError, match="Leave it out: it holds no layer. Of an exported program capture"):
        capture(program.module(), "0")
