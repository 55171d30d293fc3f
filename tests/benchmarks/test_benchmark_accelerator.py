"""What the benchmark suite measures on an accelerator alone, run on the fake device, in a child process that has it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_accelerator as fake
import pytest
import torch
from on_accelerator import count_memory

sys.path.insert(0, str(Path(__file__).parents[2]))  # the suite is beside the package, and not installed with it

from benchmarks import counts, llama
from benchmarks.cases import all_groups
from benchmarks.counts import COUNTS
from benchmarks.measure import UnavailableError, measure
from benchmarks.sizes import SMALLEST, Decoder, Size
from benchmarks.whole_models import working_backend

if fake.IN_CHILD:
    fake.install()

    SIZE = replace(SMALLEST, device=torch.device(fake.NAME))

    @pytest.mark.parametrize("name", ["copy", "llama", "extract", "captured_call"])
    def test_cases_run_there(name: str) -> None:
        made = [case for group, make in all_groups() if group == name for case in make(SIZE)]
        assert made
        for case in made:
            assert len(measure(case, 1).ours) == 1

    @pytest.mark.parametrize("count", [one for one in COUNTS if "device" in one.name or "llama" in one.name])
    def test_the_peak_of_the_allocator_is_counted_above_the_forwards(
        count: counts.Count, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tell, allocator = count_memory(monkeypatch), torch.get_device_module(fake.NAME)
        monkeypatch.setattr(allocator, "reset_peak_memory_stats", lambda device: tell(), raising=False)
        monkeypatch.setattr(allocator, "max_memory_allocated", lambda device: tell(), raising=False)
        held = count.count(SIZE)
        assert 0 < held < 16
        assert count.limit in (128 + 64, 128 + 256)

    def test_a_whole_extraction_brings_all_bytes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
        sinks: list[Any] = []
        real = llama.Discarding.__init__
        monkeypatch.setattr(llama.Discarding, "__init__", lambda sink: (real(sink), sinks.append(sink))[0])
        (case,) = llama.full(SIZE)
        with case.ours() as run, fake.recorded() as log:
            run()
        shape = SIZE.decoder
        expected = shape.whole_batches * shape.layers * llama.layer_bytes(shape)
        assert sinks[0].nbytes == expected
        assert sum(nbytes for nbytes, *_ in log.to_host) == expected

else:

    def test_what_is_measured_on_an_accelerator_alone() -> None:
        assert fake.run_in_child(__file__) >= 14


def test_the_model_of_real_size_is_not_run_on_a_cpu() -> None:
    for make in (llama.decoding, llama.full, llama.pooled, llama.one_layer):
        with pytest.raises(UnavailableError, match="needs an accelerator"):
            next(iter(make(Size())))


def test_the_model_of_real_size_has_a_billion_parameters() -> None:
    with torch.device("meta"):
        size = Size(device=torch.device("meta"), decoder=Decoder())
    found = llama.model(size)
    assert sum(one.numel() for one in found.parameters()) == pytest.approx(1e9, rel=0.1)
    assert {one.dtype for one in found.parameters()} == {torch.bfloat16}
    llama.model.cache_clear()


def test_greedy_decoding_is_the_models_own() -> None:
    import transformers

    size = replace(SMALLEST, decoder=replace(SMALLEST.decoder, layers=3))
    decoder, prompt = llama.model(size).float(), torch.arange(8)[None]
    for weights in decoder.parameters():
        torch.nn.init.normal_(weights)  # large ones, or the next token would depend on the last one alone
    seen: list[torch.Tensor] = []
    decoder.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    llama.decode(decoder, prompt, 4)
    llama.model.cache_clear()
    whole = transformers.LlamaForCausalLM(decoder.config)
    whole.model, whole.lm_head.weight = decoder, decoder.embed_tokens.weight
    whole.generation_config.eos_token_id = None  # token 0 is as good as any other
    expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert torch.cat(seen[:4], 1).tolist() == expected[:, :-1].tolist()


def test_what_compiles_is_found_by_a_trial(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, backend: refuse)
    assert working_backend(Size()) == "aot_eager"
    assert "torch.compile builds nothing here with inductor: RuntimeError" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda function, backend: function)
    assert [working_backend(size) for size in (Size(), SMALLEST)] == ["inductor", "eager"]


def test_waits_for_a_gpu_are_counted_by_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def set_mode(mode: Any) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)

    def run() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    assert counts._synchronisations(run) == 2
    assert modes == ["warn", 0]
