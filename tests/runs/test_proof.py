"""A run that is resumed proves that it is the stored one: it runs a stored batch again, and compares every value."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from models import BlockStack
from small_runs import BATCHES, FORMATS, batch, counted, files, interrupted, run, shards, small_model
from torch import nn
from torch.ao.quantization import quantize_dynamic

from activation_extractor import extract, length_batches, open_store
from activation_extractor.errors import LayerNotRunError, OtherRunError, StoreError

X = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
ROWS = [{"x": X[at : at + 3], "id": list(range(at, at + 3))} for at in range(0, 12, 3)]


class Adapted(nn.Module):
    """A layer with an adapter beside it that can be switched off, as PEFT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self._switches = [True]

    def forward(self, x):
        return self.head(self.base(x) + self.lora(x) if self._switches[0] else self.base(x))


class Scaled(nn.Module):
    """It multiplies with what no state dict holds: a tensor in a list, or in an extra state."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self.scales = nn.Linear(16, 4), [torch.tensor(scale)]

    def get_extra_state(self):
        return {"scales": self.scales}

    def set_extra_state(self, state):
        self.scales = state["scales"]

    def forward(self, x):
        return self.layer(x * self.scales[0])


class Edited(Scaled):
    def forward(self, x):
        return self.layer(x * self.scales[0] + 1e-3)


Edited.__qualname__ = Edited.__name__ = "Scaled"


def seeded(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments).eval()


def switched_off():
    model = seeded(Adapted)
    model._switches[0] = False
    return model


def steered():
    model = seeded(Adapted)
    model.base.register_forward_hook(lambda module, args, output: output + 0.5)
    return model


def quantized(factor: float = 1.0):
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].weight.mul_(factor)
    return quantize_dynamic(model, {nn.Linear})


def in_a_closure(value: float):
    model = seeded(Scaled, 1.0)
    model.layer.forward = lambda x: nn.functional.linear(x, model.layer.weight) * value
    return model


UNSEEN = {
    "a_switched_off_adapter": (lambda: seeded(Adapted), switched_off, "head"),
    "a_steering_hook": (lambda: seeded(Adapted), steered, "head"),
    "a_tensor_in_a_list": (lambda: seeded(Scaled, 1.0), lambda: seeded(Scaled, 1.5), "layer"),
    "edited_code": (lambda: seeded(Scaled, 1.0), lambda: seeded(Edited, 1.0), "layer"),
    "a_replaced_forward": (lambda: in_a_closure(1.0), lambda: in_a_closure(1.1), "layer"),
}


def store(model, out, batches=ROWS, layers="*", **options):
    options = {"ids": "id", "rows_per_unit": 6} | options
    return extract(model, batches, layers, out=out, progress=False, **options)


@pytest.mark.parametrize("after", [3, 4])
@pytest.mark.parametrize(("make", "other", "layer"), UNSEEN.values(), ids=UNSEEN)
def test_what_no_digest_sees_is_another_run_in_what_it_computes(tmp_path, make, other, layer, after):
    with pytest.raises(KeyboardInterrupt):
        store(make(), tmp_path, interrupted(ROWS, after), layer)
    before = files(tmp_path)
    text = (
        rf"it differs in what the model computes \(layer '{layer}' with 'full' differs by [\d.e+-]+ in row \d of unit"
    )
    with pytest.raises(OtherRunError, match=text):
        store(other(), tmp_path, layers=layer)
    assert files(tmp_path) == before
    assert store(make(), tmp_path, layers=layer).rows == 12


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_packed_weights_of_another_quantized_model_are_another_run(tmp_path):
    batches = [{"input": one["x"], "id": one["id"]} for one in ROWS]
    store(quantized(), tmp_path, batches, "2")
    with pytest.raises(OtherRunError, match="it differs in weights"):
        store(quantized(1.2), tmp_path, batches, "2")
    store(quantized(), tmp_path, batches, "2")


def test_the_error_names_the_first_layer_and_the_row_that_differs_most(tmp_path):
    one, other = small_model(), small_model()
    other.h[1].register_forward_hook(lambda module, args, output: output + torch.tensor([0, 2.0, 1.0])[:, None, None])
    run(tmp_path, model=one)
    text = r"\(layer 'h\.1' with 'mean' differs by 2 in row 1 of unit '00000000', id 'row 1'\)\. Use what"
    with pytest.raises(OtherRunError, match=text):
        run(tmp_path, model=other)


def test_a_layer_that_runs_now_and_did_not_then_is_another_run(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes, self._on = nn.Linear(16, 4), nn.Linear(4, 4), [False]

        def forward(self, x):
            x = self.always(x)
            return self.sometimes(x) if self._on[0] else x

    model = seeded(Sometimes)
    options = {"missing": "skip"}
    store(model, tmp_path / "a", **options)
    model._on[0] = True
    with pytest.raises(OtherRunError, match="layer 'sometimes' with 'full' ran now and did not run then"):
        store(model, tmp_path / "a", **options)
    store(model, tmp_path / "b", layers="sometimes", **options)
    plain = {"ids": None, "layers": "sometimes", "batches": [one["x"] for one in ROWS]}
    store(model, tmp_path / "c", **options, **plain)
    model._on[0] = False
    with pytest.raises(OtherRunError, match="layer 'sometimes' with 'full' ran then and did not run now"):
        store(model, tmp_path / "b", layers="sometimes", **options)
    with pytest.raises(OtherRunError, match=r"what the model computes \(0 rows in place of 6\)"):
        store(model, tmp_path / "c", **options, **plain)
    store(model, tmp_path / "d", **options)
    with pytest.raises(LayerNotRunError) as caught:
        store(model, tmp_path / "e", ROWS[:2])
    assert not hasattr(caught.value, "__notes__")


def test_an_error_of_the_batch_that_is_run_again_says_that_it_is_one(tmp_path):
    store(seeded(Adapted), tmp_path)
    model = seeded(Adapted)
    model.head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        store(model, tmp_path)
    assert "A batch that is stored was run again" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_shard_is_not_taken_for_another_run(tmp_path, kind):
    store(seeded(Adapted), tmp_path, layers="head", format=kind)
    file = min(path for path in tmp_path.glob("shards/00000000*/**/*-head*" if kind == "npy" else "shards/00000000*"))
    value = open_store(tmp_path)["head"][1].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(value, value[::-1]))
    with pytest.raises(
        StoreError, match=r"must hold what was written, got other bytes in 'head:full'.*Restore"
    ) as caught:
        store(seeded(Adapted), tmp_path, layers="head", format=kind)
    assert type(caught.value) is StoreError


@pytest.mark.parametrize("gone", [[0], [0, 1], [1]], ids=str)
def test_missing_units_are_written_only_after_the_proof(tmp_path, gone):
    options = {"rows_per_unit": 3, "layers": "head"}
    store(seeded(Adapted), tmp_path, **options)
    whole = shards(tmp_path)
    for unit in gone:
        (tmp_path / f"shards/{unit:08d}.safetensors").unlink()
    before = files(tmp_path)
    with pytest.raises(OtherRunError, match="what the model computes"):
        store(switched_off(), tmp_path, **options)
    assert files(tmp_path) == before
    store(seeded(Adapted), tmp_path, **options)
    assert shards(tmp_path) == whole


class Every(nn.Module):
    """Values of many kinds, in bfloat16, at layers that run once, twice, or for some batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.sometimes, self.nan = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.bfloat16()

    def forward(self, x, attention_mask=None):
        x = self.drop(self.twice(self.twice(x.bfloat16())))
        self.nan(torch.where(x > 0, x, torch.nan))
        return self.sometimes(x) if len(x) != 2 else x


@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize("calls", ["all", "join"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_column_is_the_same_when_it_is_run_again(tmp_path, kind, calls, has_ids):
    lengths, generator = [5, 1, 3, 4, 2, 6, 1, 1], torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 4, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    batches = [
        {"x": x[rows], "attention_mask": mask[rows], "place": rows, "id": [f"row {row}" for row in rows]}
        for rows in length_batches(lengths, batch_size=2, window_rows=5)
    ]
    options = {"layers": "*", "order": "place", "keep": "id", "missing": "skip", "format": kind, "calls": calls}
    options |= {"rows_per_unit": 4, "reduce": ["mean", "full", "last"], "ids": None}
    if has_ids:
        options |= {"ids": "id", "keep": ()}
    model = seeded(Every)
    store(model, tmp_path, (one for one in batches), **options)
    before = files(tmp_path)
    model, calls_of = counted(model)
    store(model.train(), tmp_path, (one for one in batches), **options)
    assert len(calls_of) == 1
    assert files(tmp_path) == before


def test_rows_of_an_ordered_batch_are_found_by_their_places(tmp_path):
    batches = [{"x": X[rows], "place": rows, "id": rows} for rows in ([4, 2, 0], [1, 5, 3])]
    store(seeded(Adapted), tmp_path, batches, order="place")
    model = seeded(Adapted)
    model.head.register_forward_hook(lambda module, args, output: output + torch.tensor([0, 0.5, 0])[:, None])
    with pytest.raises(OtherRunError, match=r"layer 'head' with 'full' differs by 0\.5 in row 2 of unit '0+', id 2\)"):
        store(model, tmp_path, batches, order="place")


@pytest.mark.parametrize("options", [{"stop_early": True}, {"reduce": ["mean", "max"]}, {"rows_per_unit": 1}], ids=str)
def test_options_do_not_change_what_is_the_same(tmp_path, options):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted(BATCHES, 4), **options)
    run(tmp_path, **options)
    run(tmp_path, iter(BATCHES), **options)


def test_one_row_in_one_batch_is_enough(tmp_path):
    run(tmp_path, [batch(slice(0, 1))])
    model = small_model()
    model.h[0].register_forward_hook(lambda module, args, output: output * 1.0001)
    with pytest.raises(OtherRunError, match=r"layer 'h\.0'"):
        run(tmp_path, [batch(slice(0, 1))], model=model)
    assert run(tmp_path, [batch(slice(0, 1))]).rows == 1


def test_a_loader_that_fills_one_buffer_again_and_again_is_the_same(tmp_path):
    def batches():
        buffer = torch.empty(3, 16)
        for one in ROWS:
            yield {"x": buffer.copy_(one["x"]), "id": one["id"]}

    for _ in range(2):
        assert store(seeded(Adapted), tmp_path, batches()).rows == 12


def noise(size: float):
    """A model that adds random numbers to what it computes, other ones each time."""
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 4)))
    model[0].register_forward_hook(lambda module, args, output: output + size * torch.rand_like(output))
    return model


PLAIN = [{"input": one["x"], "id": one["id"]} for one in ROWS]


def test_a_model_that_draws_random_numbers_is_refused_with_the_reason(tmp_path):
    model = noise(1.0)
    store(model, tmp_path, PLAIN)
    with pytest.raises(OtherRunError, match="two runs of the batch give other values, as with random"):
        store(model, tmp_path, PLAIN)


@pytest.mark.parametrize("gone", [0, 1])
def test_random_numbers_from_one_seed_are_the_same_and_no_others_are_added_to_them(tmp_path, gone):
    store(noise(1.0), tmp_path, PLAIN)
    store(noise(1.0), tmp_path, PLAIN)
    (tmp_path / f"shards/{gone:08d}.safetensors").unlink()
    before = files(tmp_path)
    with pytest.raises(
        OtherRunError, match="draws random numbers, and would go on with others than a run that was not"
    ):
        store(noise(1.0), tmp_path, PLAIN)
    assert files(tmp_path) == before


def test_random_numbers_that_change_nothing_are_not_in_the_way(tmp_path):
    def make():
        model = seeded(lambda: nn.Sequential(nn.Linear(16, 4)))
        model[0].register_forward_hook(lambda *_: torch.rand(3) is None or None)  # as layerdrop does
        return model

    for stop in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            store(make(), tmp_path, interrupted(PLAIN, stop))
    torch.rand(1)
    assert store(make(), tmp_path, PLAIN).rows == 12


def test_bits_that_differ_each_time_are_accepted_with_a_warning(tmp_path):
    model = noise(1e-6)
    store(model, tmp_path, PLAIN)
    with pytest.warns(UserWarning, match=r"is resumed, although its values differ by rounding \(layer '0' with"):
        store(model, tmp_path, PLAIN)


def test_the_proof_leaves_random_numbers_as_they_were(tmp_path):
    model = seeded(Adapted)
    model.head.register_forward_hook(lambda *_: torch.rand(3) is None or None)
    store(model, tmp_path)
    before = torch.get_rng_state()
    store(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def change_manifest(out, change) -> None:
    path = out / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


OTHERS = {
    "torch": ("torch", "2.1.0", r"torch \('.*' in place of '2\.1\.0'\)"),
    "device": ("devices", ["cuda NVIDIA A100"], r"devices \(without cuda NVIDIA A100, with cpu"),
    "arithmetic": (
        "get_float32_matmul_precision",
        "high",
        r"get_float32_matmul_precision \('highest' in place of 'high'",
    ),
}


def off_by(size: float):
    model = seeded(Adapted)
    model.head.register_forward_hook(lambda module, args, output: output + size)
    return model


@pytest.mark.parametrize(("name", "value", "text"), OTHERS.values(), ids=OTHERS)
def test_where_the_arithmetic_is_another_one_rounding_is_accepted_with_a_warning(tmp_path, name, value, text):
    store(seeded(Adapted), tmp_path)
    with pytest.raises(OtherRunError):
        store(off_by(1e-6), tmp_path)
    change_manifest(tmp_path, lambda content: content["computed_with"].update({name: value}))
    store(seeded(Adapted), tmp_path)  # the same bits need no warning
    with pytest.warns(UserWarning, match=text):
        store(off_by(1e-6), tmp_path)
    with pytest.raises(OtherRunError, match=text):
        store(off_by(0.1), tmp_path)


def test_a_model_that_writes_to_its_input_is_run_on_copies(tmp_path):
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.add_(1))

    inputs = [one["x"].clone() for one in ROWS]
    store(seeded(InPlace, 16, 4), tmp_path, [one.clone() for one in inputs], "", ids=None)
    before = [one.clone() for one in inputs]
    store(seeded(InPlace, 16, 4), tmp_path, inputs, "", ids=None)
    assert all(map(torch.equal, inputs, before))
    model = seeded(InPlace, 16, 4)
    model.register_forward_hook(lambda module, args, output: output * 1.00001)
    with pytest.raises(OtherRunError, match=r"in row \d of unit '0+'\)\. Use"):
        store(model, tmp_path, inputs, "", ids=None)


class Summed(nn.Module):
    """A sum over a whole tensor is made of a part for each thread, and rounded accordingly."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Identity()

    def forward(self, x):
        return self.total(x.sum().expand(len(x), 1))


def test_as_many_threads_as_then_compute_the_batch_that_is_run_again(tmp_path, number_of_threads):
    batches = [torch.randn(3, 300_000, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    torch.set_num_threads(2)
    store(Summed(), tmp_path, batches, ids=None)
    torch.set_num_threads(1)
    total = open_store(tmp_path)["total"][0]
    assert Summed()(batches[0])[0] != total, "the sum does not depend on threads: a test of nothing"
    store(Summed(), tmp_path, batches, ids=None)
    assert torch.get_num_threads() == 1
    model = Summed()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 1.00001,))
    with pytest.raises(OtherRunError):
        store(model, tmp_path, batches, ids=None)


def test_a_store_that_does_not_say_what_computed_it_is_resumed_within_rounding(tmp_path):
    store(seeded(Adapted), tmp_path)
    change_manifest(tmp_path, lambda content: content.pop("computed_with"))
    with pytest.warns(UserWarning, match="the store does not say what computed it") as caught:
        store(off_by(1e-6), tmp_path)
    assert [one.filename for one in caught] == [__file__]


def test_half_precision_in_a_format_without_it_has_its_own_tolerance(tmp_path):
    model = seeded(BlockStack, 2).bfloat16()
    run(tmp_path, model=model, format="npz")
    change_manifest(tmp_path, lambda content: content["computed_with"].update(torch="2.1.0"))
    other = copy.deepcopy(model)
    other.h[1].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.warns(UserWarning, match="differ by rounding"):
        run(tmp_path, model=other, format="npz")


def test_another_process_that_began_the_store_meanwhile_is_proven_too(tmp_path):
    def late():
        yield ROWS[0]
        yield ROWS[1]
        if not (tmp_path / "out").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "out", dirs_exist_ok=True)
        yield from ROWS[2:]

    store(seeded(Adapted), tmp_path / "other", rows_per_unit=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store(seeded(Adapted), tmp_path / "out", late(), rows_per_unit=12)
    assert open_store(tmp_path / "out").rows == 12
