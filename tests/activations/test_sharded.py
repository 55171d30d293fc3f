"""Models that are cut along their layers, over two processes: a part of a value is never taken for the whole."""

from __future__ import annotations

import pytest
import torch
from spread_models import X, plain, tensor_parallel
from torch import Tensor, nn

from activation_extractor import capture, gradients, inputs, open_store
from activation_extractor.errors import ArgumentError, PartError

LAYERS = ["up", "act", "down"]
MASK = torch.arange(6) < torch.tensor([[6], [4], [1], [5]])
LOCAL = {}
DISTRIBUTED = {"up": "ColwiseParallel(use_local_output=False)", "down": "RowwiseParallel(use_local_output=False)"}
# Positions are cut between layers, as in the recipes of torchtitan: what is added up is local, and a part.
SEQUENCE = {
    "embed": "RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))",
    "norm": "SequenceParallel()",
    "up": "ColwiseParallel(input_layouts=Shard(1))",
    "down": "RowwiseParallel(output_layouts=Shard(1))",
}


class Residual(nn.Module):
    """A residual stream: embeds, and adds what a norm and two layers make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.act, self.down = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.add = Add()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        return self.add(x, self.down(self.act(self.up(self.norm(x)))))


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Heads(nn.Module):
    """Cuts features into heads: where they are in the whole is not known."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def with_heads() -> nn.Module:
    model = plain()
    model.act = nn.Sequential(Heads(), nn.Flatten(2, 3), nn.Unflatten(2, (6, 4)), nn.ReLU())
    model.down.forward = lambda x: x
    return model


def styles(plan):
    from torch.distributed import tensor
    from torch.distributed.tensor import parallel

    return {name: eval(style, vars(parallel) | vars(tensor)) for name, style in plan.items()}


def parallel(plan, make=plain):
    """A model that is parallel by a plan; that of `tensor_parallel` where nothing else is said."""
    from spread_models import mesh
    from torch.distributed.tensor.parallel import parallelize_module

    if make is plain:
        return tensor_parallel(**styles(plan))
    return parallelize_module(make(), mesh(), styles(plan))


def values_of(acts):
    """What can be sent to another process."""
    return {key: value if type(value) is Tensor else type(value).__name__ for key, value in acts.items()}


def captured(rank, plan, layers, options, make=plain, given=()):
    """What a model that is parallel by a plan records, and how it is shown; or the error."""
    model = parallel(plan, make)
    try:
        with torch.no_grad(), capture(model, layers, **options) as acts:
            model(*(given or (X,)))
    except Exception as error:
        return type(error).__name__, str(error)
    return values_of(acts), repr(acts)


def whole(layers=LAYERS, make=plain, given=(), **options):
    """What the plain model records."""
    model = make()
    with torch.no_grad(), capture(model, layers, **options) as acts:
        model(*(given or (X,)))
    return dict(acts)


def check(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("reduce", [None, "mean", "last", ["max", "first"]], ids=str)
@pytest.mark.parametrize("plan", [LOCAL, DISTRIBUTED], ids=["local", "DTensor"])
def test_gathered_values_are_those_of_the_plain_model(ranks, plan, reduce):
    options = {"reduce": reduce, "sharded": "gather"}
    for values, shown in ranks(captured, plan, LAYERS, options, plain, (X, MASK)):
        check(values, whole(reduce=reduce, given=(X, MASK)))
        assert "part" not in shown


@pytest.mark.parametrize("layer", ["up", "act"])
def test_a_part_is_refused_where_nothing_says_what_becomes_of_it(ranks, layer):
    for rank, (kind, text) in enumerate(ranks(captured, LOCAL, [layer], {})):
        assert (kind, text) == ("PartError", str(PartError(layer, f"part {rank + 1} of 2 along axis 2")))
    assert all(kind == "PartError" for kind, _ in ranks(captured, DISTRIBUTED, [layer], {"reduce": "mean"}))


def test_a_layer_whose_value_is_whole_needs_no_option(ranks):
    for plan in (LOCAL, DISTRIBUTED):
        for values, _ in ranks(captured, plan, ["down"], {"reduce": "mean"}):
            check(values, whole(["down"], reduce="mean"))
    assert ranks(captured, DISTRIBUTED, LAYERS, {})[0][0] == dict.fromkeys(LAYERS, "DTensor")


@pytest.mark.parametrize("plan", [LOCAL, DISTRIBUTED], ids=["local", "DTensor"])
def test_a_local_part_is_recorded_and_said_to_be_one(ranks, plan):
    wanted = whole()
    for rank, (values, shown) in enumerate(ranks(captured, plan, LAYERS, {"sharded": "local"})):
        check(values, {**wanted, **{name: wanted[name].chunk(2, 2)[rank] for name in ("up", "act")}})
        assert shown.count(f"part {rank + 1} of 2 along axis 2") == 2


LATER = ["act.0", "act.2"]


@pytest.mark.parametrize("sharded", [None, "gather"])
@pytest.mark.parametrize("layer", LATER)
def test_a_part_of_which_is_not_known_how_it_is_cut_is_refused(ranks, layer, sharded):
    plan = {"up": "ColwiseParallel()"}
    for kind, text in ranks(captured, plan, [layer], {"sharded": sharded}, with_heads):
        assert (kind, text) == ("PartError", str(PartError(layer, "")))
    for values, shown in ranks(captured, plan, [layer], {"sharded": "local"}, with_heads):
        assert values[layer].numel() == 4 * 6 * 32
        assert "a part" in shown


IDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))
IDS_MASK = torch.arange(7) < torch.tensor([[7], [4], [1], [5]])


@pytest.mark.parametrize("reduce", [None, "mean", "last"])
def test_positions_that_are_cut_are_gathered(ranks, reduce):
    given, layers = (IDS[:, :6], IDS_MASK[:, :6]), ["embed", "norm", "up", "act", "down", "add"]
    options = {"reduce": reduce, "sharded": "gather"}
    for values, _ in ranks(captured, SEQUENCE, layers, options, residual, given):
        check(values, whole(layers, residual, given, reduce=reduce))
    for layer in ("embed", "down", "add"):
        assert ranks(captured, SEQUENCE, [layer], {"reduce": reduce}, residual, given)[0][0] == "PartError"


def unevenly(rank):
    model = parallel({"embed": SEQUENCE["embed"]}, residual)
    with torch.no_grad(), capture(model, "embed", sharded="gather", mask=None, reduce=["full", "mean"]) as acts:
        model.embed(IDS)  # torch's own norm of positions that do not divide evenly ends the process
    return values_of(acts)


def test_parts_of_different_sizes_are_gathered(ranks):
    wanted = residual().embed(IDS).detach()
    for values in ranks(unevenly):
        check(values, {("embed", "full"): wanted, ("embed", "mean"): wanted.mean(1)})


OTHER_WAYS = {
    "columns handed out whole": {
        "up": "ColwiseParallel(output_layouts=Replicate())",
        "down": "RowwiseParallel(input_layouts=Replicate())",
    },
    "rows handed out in parts": {"down": "RowwiseParallel(output_layouts=Shard(1))"},
    "rows handed out in parts of the batch": {
        "down": "RowwiseParallel(output_layouts=Shard(0), use_local_output=False)"
    },
    "a module that prepares its output": {
        "act": "PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Shard(-1))"
    },
    "a module that makes its output whole": {
        "act": "PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate())",
        "down": "RowwiseParallel(input_layouts=Replicate())",
    },
    "a module that prepares its input": {
        "up": "ColwiseParallel(output_layouts=Replicate())",
        "act": "PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(-1), use_local_output=True)",
    },
    "a norm of its own positions": {
        "up": "ColwiseParallel(output_layouts=Shard(1))",
        "act": "SequenceParallel(use_local_output=True)",
        "down": "RowwiseParallel(input_layouts=Shard(1))",
    },
}


@pytest.mark.parametrize("plan", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_other_ways_of_handing_out_are_known(ranks, plan):
    for values, _ in ranks(captured, plan, LAYERS, {"sharded": "gather"}):
        check(values, whole())
    for layer in LAYERS:
        for kind, _ in ranks(captured, plan, [layer], {"reduce": "mean"}):
            assert kind == "PartError" or kind[layer].shape == whole([layer], reduce="mean")[layer].shape


def sides(rank, plan, options):
    model = parallel(plan)
    with capture(
        model, [inputs("down"), inputs("act"), gradients("up"), gradients("act"), gradients("down")], **options
    ) as acts:
        out = model(X)
        out = out.full_tensor() if hasattr(out, "full_tensor") else out
        out.square().sum().backward()
    return values_of(acts)


@pytest.mark.parametrize("plan", [LOCAL, DISTRIBUTED], ids=["local", "DTensor"])
def test_inputs_and_gradients_are_gathered_as_well(ranks, plan):
    model = plain()
    with capture(model, [inputs("down"), inputs("act"), gradients("up"), gradients("act"), gradients("down")]) as acts:
        model(X).square().sum().backward()
    for values in ranks(sides, plan, {"sharded": "gather"}):
        check(values, dict(acts))


def gradient_of_a_part(rank):
    model = parallel(LOCAL)
    with pytest.raises(PartError, match="layer 'up'"), capture(model, gradients("up")):
        model(X).sum().backward()
    return True


def test_the_gradient_of_a_part_is_a_part(ranks):
    assert ranks(gradient_of_a_part) == [True, True]


def into_a_store(rank, folder, options):
    model = parallel(LOCAL)
    with torch.no_grad(), capture(model, LAYERS, sink=f"{folder}/{rank}", **options):
        model(X, attention_mask=MASK)
    return True


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_a_store_holds_whole_values(ranks, tmp_path, reduce):
    ranks(into_a_store, str(tmp_path), {"reduce": reduce, "sharded": "gather"})
    wanted = whole(reduce=reduce)
    for rank in range(2):
        store = open_store(tmp_path / str(rank))
        for layer in LAYERS if reduce else ():
            torch.testing.assert_close(store[layer].torch(), whole(reduce="mean", given=(X, MASK))[layer])
        for row in range(0 if reduce else 4):
            torch.testing.assert_close(torch.as_tensor(store["up"][row]), wanted["up"][row][MASK[row]])


def alone(rank):
    """Only the first process captures: what would wait for the others is not done unasked."""
    model = parallel(DISTRIBUTED)
    if rank:
        with torch.no_grad():
            model(X)
        return True
    with torch.no_grad(), capture(model, LAYERS) as acts:
        model(X)
    with pytest.raises(TypeError, match=r"'up' must hold plain numbers in an array, got a DTensor.*sharded='gather'"):
        acts.numpy()
    with pytest.raises(TypeError, match="sharded='gather'"):
        acts.save("never.safetensors")
    assert "DTensor" in type(acts["up"]).__name__
    assert acts["down"].to_local().shape == (4, 6, 32)
    return True


def test_nothing_waits_for_other_processes_unasked(ranks):
    assert ranks(alone) == [True, True]


def nested_blocks(rank):
    model = parallel(LOCAL)
    with torch.no_grad(), capture(model, "up", sharded="local") as outer:
        model(X)
        with capture(model, LAYERS, sharded="gather") as inner:
            model(X)
    model(X)  # nothing is left on it
    return values_of(outer)["up"], values_of(inner)["up"], [len(it._forward_hooks) for it in model.modules()]


def test_blocks_may_be_nested_and_leave_nothing_behind(ranks):
    for rank, (part, gathered, hooks) in enumerate(ranks(nested_blocks)):
        torch.testing.assert_close(gathered, whole()["up"])
        torch.testing.assert_close(part, gathered.chunk(2, 2)[rank])
        assert hooks == [0, 1, 0, 1]


def test_another_word_is_an_error():
    with pytest.raises(ArgumentError, match="sharded must be one of None, 'gather', 'local', got 'whole'"):
        capture(plain(), "up", sharded="whole")


def test_the_option_changes_nothing_in_a_process_of_its_own():
    check(whole(sharded="gather"), whole())
    check(whole(sharded="local", reduce="mean"), whole(reduce="mean"))


def previewed(rank):
    from activation_extractor import preview

    rows = preview(parallel(LOCAL), "*", X)
    return [(row.shape, row.part) for row in rows], repr(rows)


def test_a_preview_says_which_part_a_value_is(ranks):
    for rank, (rows, shown) in enumerate(ranks(previewed)):
        part = f"part {rank + 1} of 2 along axis 2"
        assert rows == [((4, 6, 32), part), ((4, 6, 32), part), ((4, 6, 32), "")]
        assert shown.count(part) == 2


def of_two_kinds(rank, sizes):
    """A model whose layers are cut over one axis of a mesh, and whose weights are cut over the other one."""
    from spread_models import mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    both = mesh(*sizes, names=("data", "tensor"))
    model = parallelize_module(
        plain(), both["tensor"], styles({"up": "ColwiseParallel()", "down": "RowwiseParallel()"})
    )
    fully_shard(model, mesh=both["data"])
    with torch.no_grad(), capture(model, LAYERS, sharded="gather") as acts:
        model(X)
    return values_of(acts)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_tensor_parallel_layers_of_an_fsdp_model_are_gathered(ranks, sizes):
    for values in ranks(of_two_kinds, sizes):
        check(values, whole())


def by_hand(rank, options):
    """A model of DTensors that no style has made."""
    from spread_models import mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = plain()
    for layer, weight, bias in ((model.up, Shard(0), Shard(0)), (model.down, Shard(1), Replicate())):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh(), [weight]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias, mesh(), [bias]))
    with torch.no_grad(), capture(model, LAYERS, mask=None, **options) as acts:
        model(distribute_tensor(X, mesh(), [Replicate()]))
    return values_of(acts)


def test_dtensors_that_no_style_has_made_are_gathered(ranks):
    for options in ({}, {"reduce": "mean"}):
        for values in ranks(by_hand, {"sharded": "gather", **options}):
            check(values, whole(**options))
