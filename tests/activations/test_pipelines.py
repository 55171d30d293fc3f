"""Stages of a pipeline, over two processes: the microbatches that a stage runs are one batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from activation_extractor import capture, gradients, inputs, open_store
from activation_extractor.errors import StepError

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(5) < torch.tensor([[5], [4], [1], [3], [5], [2]])
LAYERS = ["layers.0", "layers.1"]
SCHEDULES = ["ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B"]
MICROBATCHES = 3


class Part(nn.Module):
    """What one stage runs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TimeFirst(nn.Module):
    """``(seq, batch, 8)`` to the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gru = nn.GRU(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.gru(x)[0]


class Around(nn.Module):
    """A model of which the stage is a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def pipeline(rank, schedule, make=Part, **options):
    """The modules of a process's stages, and what runs a batch through them."""
    from torch.distributed import pipelining

    stages_each = 2 if "Interleaved" in schedule else 1
    modules = [make(rank + 2 * number) for number in range(stages_each)]
    count, device = 2 * stages_each, torch.device("cpu")
    stages = [pipelining.PipelineStage(it, rank + 2 * k, count, device) for k, it in enumerate(modules)]
    loss = None if schedule == "ScheduleGPipe" else lambda out, target: (out - target).square().sum()
    scheduled = getattr(pipelining, schedule)(
        stages if stages_each > 1 else stages[0], MICROBATCHES if stages_each == 1 else 6, loss_fn=loss, **options
    )

    def run(x=X, mask=MASK):
        given = () if rank else (x,)
        target = {"target": x} if rank and loss else {}
        scheduled.step(*given, attention_mask=mask, **target)

    return modules, run


def values_of(acts):
    of_calls = {key: value if isinstance(value, list) else [value] for key, value in acts.items()}
    found = {key: [call.detach() for call in value] for key, value in of_calls.items()}
    return {key: value if isinstance(acts[key], list) else value[0] for key, value in found.items()}


def staged(rank, schedule, layers, options):
    modules, run = pipeline(rank, schedule)
    with capture(modules[-1], layers, **options) as acts:
        run()
    return values_of(acts)


def whole(stage, layers=LAYERS, schedule="ScheduleGPipe", **options):
    """What the plain modules record of the whole batch, for the last stage of a process."""
    last = stage + 2 if "Interleaved" in schedule else stage
    x, found = X, {}
    for seed in range(last + 1):
        with capture(part := Part(seed), layers, **options) as acts:
            x = part(x, attention_mask=MASK)
        found = values_of(acts)
    return found


def check(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("options", [{}, {"reduce": ["mean", "last"]}, {"copy": False}, {"to": "cpu"}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_microbatches_are_joined_along_the_batch(ranks, schedule, options):
    for stage, values in enumerate(ranks(staged, schedule, LAYERS, options)):
        check(values, whole(stage, schedule=schedule, **options))


def test_inputs_of_layers_are_joined_too(ranks):
    layers = [inputs("layers.1.0")]
    for stage, values in enumerate(ranks(staged, "ScheduleGPipe", layers, {})):
        check(values, whole(stage, layers))


def test_all_calls_are_those_of_microbatches_alone(ranks):
    layers = [*LAYERS, gradients("layers.1")]
    for stage, values in enumerate(ranks(staged, "Schedule1F1B", layers, {"calls": "all"})):
        assert {key: len(value) for key, value in values.items()} == dict.fromkeys(values, MICROBATCHES)
        torch.testing.assert_close(torch.cat(values["layers.1"]), whole(stage)["layers.1"])
        assert torch.cat(values["layers.1:gradient"]).shape == (6, 5, 8)


def refused(rank, layers, options):
    modules, run = pipeline(rank, "Schedule1F1B")
    try:
        with capture(modules[0], layers, **options):
            run()
    except StepError as error:
        return str(error)
    return None


def test_what_cannot_be_joined_is_an_error_after_the_schedule_so_that_no_stage_waits(ranks):
    for text in ranks(refused, LAYERS, {"calls": "join"}):
        assert text.startswith("A step must hold one sequence when calls are joined, got microbatches of a pipeline")
    for text in ranks(refused, [gradients("layers.1")], {}):
        assert text.startswith("A step must hold whole batches when gradients are recorded, got microbatches")


def of_a_part(rank):
    modules, run = pipeline(rank, "ScheduleGPipe")
    with pytest.raises(StepError, match=r"microbatches of a part of it, with 'part\.layers\.0'\. Capture the module"):
        with capture(Around(modules[0]), "part.layers.0", missing="skip"):
            run()
    return True


def test_a_model_of_which_a_stage_is_a_part_is_refused(ranks):
    assert ranks(of_a_part) == [True, True]


def several_batches(rank):
    modules, run = pipeline(rank, "ScheduleGPipe")
    with warnings.catch_warnings(record=True) as caught, capture(modules[0], LAYERS) as acts:
        warnings.simplefilter("always")
        run()
        first = values_of(acts)
        run(X + 1)
        run(X + 2)
    return first, values_of(acts), [str(warning.message) for warning in caught]


def test_a_further_batch_takes_the_place_of_the_one_before_it(ranks):
    for stage, (first, last, texts) in enumerate(ranks(several_batches)):
        check(first, whole(stage))
        assert last["layers.0"].shape == (6, 5, 8)
        assert not torch.equal(first["layers.0"], last["layers.0"])
        assert [text[:22] for text in texts] == ["The model ran 9 times "]


def into_stores(rank, folder, grouped, ids):
    modules, run = pipeline(rank, "ScheduleGPipe")
    with capture(modules[0], LAYERS, reduce="mean", sink=f"{folder}/{rank}") as acts:
        for _ in range(2):
            if not grouped:
                run()
                continue
            with acts.step(ids=None if ids is None else [f"{_}{row}" for row in range(6)]):
                run()
    return True


@pytest.mark.parametrize(("grouped", "ids"), [(False, None), (True, None), (True, "yes")])
def test_a_store_holds_each_row_once(ranks, tmp_path, grouped, ids):
    ranks(into_stores, str(tmp_path), grouped, ids)
    for stage in range(2):
        store, wanted = open_store(tmp_path / str(stage)), whole(stage, reduce="mean")
        for layer in LAYERS:
            torch.testing.assert_close(store[layer].torch(), wanted[layer].repeat(2, 1))


TIME_FIRST = X.transpose(0, 1).contiguous()


def time_first(rank):
    from torch.distributed.pipelining.microbatch import TensorChunkSpec

    modules, run = pipeline(rank, "ScheduleGPipe", TimeFirst, args_chunk_spec=(TensorChunkSpec(1),))
    with capture(modules[0], "gru", mask=None) as acts:
        run(TIME_FIRST, MASK)
    return acts["gru"].detach()


def test_a_layer_with_the_time_first_has_its_batch_second(ranks):
    x = TIME_FIRST
    for seed, found in enumerate(ranks(time_first)):
        x = TimeFirst(seed)(x)
        torch.testing.assert_close(found, x.detach())
