"""Memory for what is kept longer than a step."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_extractor.sinks import _host_memory
from activation_extractor.sinks._host_memory import BLOCK_BYTES, FIRST_BLOCK_BYTES, SMALL_BYTES, HostMemory

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.int8]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_copies_are_equal_contiguous_and_do_not_overlap(kinds):
    memory = HostMemory()
    given_tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in kinds]
    kept = [memory.keep(tensor) for tensor in given_tensors]
    for tensor, copy in zip(given_tensors, kept, strict=True):
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
        assert torch.equal(
            copy.view(torch.uint8) if copy.dim() else copy, tensor.view(torch.uint8) if copy.dim() else tensor
        )


def test_a_copy_does_not_change_with_its_source_and_may_be_of_any_strides():
    memory, source = HostMemory(), torch.arange(6.0).reshape(2, 3).T
    copy = memory.keep(source)
    source.zero_()
    assert copy.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_large_tensor_comes_back_as_it_is():
    large, small = torch.zeros(SMALL_BYTES // 4 + 1), torch.zeros(SMALL_BYTES // 4)
    memory = HostMemory()
    assert memory.keep(large) is large
    assert memory.keep(small) is not small


def test_a_large_part_of_something_larger_is_copied_so_that_the_rest_is_freed():
    memory, whole = HostMemory(), torch.zeros(3, SMALL_BYTES)
    part, most = memory.keep(whole[0]), memory.keep(whole[:2])
    assert part.untyped_storage().nbytes() == SMALL_BYTES * 4
    assert most.data_ptr() == whole.data_ptr()


def test_each_block_is_twice_as_large_as_the_one_before_up_to_a_limit_and_all_are_counted():
    memory, blocks = HostMemory(), {}
    for number in range(200):
        kept = memory.keep(torch.full((FIRST_BLOCK_BYTES // 4,), float(number)))
        blocks.setdefault(kept.untyped_storage().data_ptr(), kept.untyped_storage().nbytes())
        assert kept[0].item() == number
    sizes = list(blocks.values())
    assert sizes[:8] == [min(FIRST_BLOCK_BYTES << power, BLOCK_BYTES) for power in range(8)]
    assert memory.nbytes >= sum(sizes[-2:])


def test_what_comes_back_as_it_is_counts_too():
    memory = HostMemory()
    memory.keep(torch.zeros(SMALL_BYTES + 1, dtype=torch.uint8))
    assert memory.nbytes == SMALL_BYTES + 1
    memory.keep(torch.zeros(1))
    assert memory.nbytes == SMALL_BYTES + 1 + FIRST_BLOCK_BYTES


def test_memory_is_given_back_with_the_last_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    made = []

    class Watched(_host_memory.mmap.mmap):
        def __new__(cls, *args):
            made.append(weakref.ref(new := super().__new__(cls, *args)))
            return new

    monkeypatch.setattr(_host_memory.mmap, "mmap", Watched)
    memory = HostMemory()
    first, second = memory.keep(torch.ones(3)), memory.keep(torch.ones(3))
    del memory, first
    gc.collect()
    assert made[0]() is not None
    assert second.tolist() == [1, 1, 1]
    del second
    gc.collect()
    assert made[0]() is None


GROWING = """
import sys, tempfile, torch
from torch import nn
from activation_extractor import capture

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

model, x = nn.Sequential(nn.Linear(64, 1024)).eval(), torch.randn(8, 128, 64)
with torch.inference_mode(), capture(model, "0", reduce="mean", sink=tempfile.mkdtemp() + "/store"):
    for step in range(120):
        model(x)
        if step == 19:
            before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory")
def test_pooled_steps_do_not_make_memory_grow_by_an_activation_each():
    child = subprocess.run([sys.executable, "-c", GROWING], check=True, capture_output=True, text=True)
    assert float(child.stdout) < 100  # 100 activations of 4 MiB without it
