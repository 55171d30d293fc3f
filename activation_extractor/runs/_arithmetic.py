"""What computes a run: the bits of its values depend on it, within rounding."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from activation_extractor._format._fingerprints import differences
from activation_extractor.runs._devices import devices

COMPUTED_WITH = "computed_with"  # the member of a manifest that holds it

_CPU_INFO = Path("/proc/cpuinfo")
_THREADS = "get_num_threads"  # a sum over a whole tensor is one of a part for each thread
_SETTINGS = (  # what chooses kernels and how they round, as torch calls it
    _THREADS,
    "get_float32_matmul_precision",
    "backends.cpu.get_cpu_capability",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.cuda.matmul.allow_tf32",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.benchmark",
)


def computed_with(model: nn.Module) -> dict[str, Any]:
    """The devices that a model runs on, the release of torch, and its settings, as JSON holds them."""
    names = sorted({_name(device) for device in devices(model)})
    return {"torch": str(torch.__version__), "devices": names} | {name: _setting(name) for name in _SETTINGS}


def reasons_to_differ(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why the values of a run may differ by rounding from those of the store with this manifest, for people.

    The number of threads is none: see `threads_of`.
    """
    before = manifest.get(COMPUTED_WITH)
    if not isinstance(before, Mapping):
        return ["the store does not say what computed it"]
    reasons = differences({**before, _THREADS: now[_THREADS]}, now)
    if now["backends.cudnn.benchmark"] and any(name.startswith("cuda") for name in now["devices"]):
        reasons.append("backends.cudnn.benchmark, which chooses kernels by their time")
    return reasons


@contextmanager
def threads_of(manifest: Mapping[str, Any]) -> Iterator[bool]:
    """As many threads as computed the store with this manifest; gives whether that is another number than now."""
    before, now = (manifest.get(COMPUTED_WITH) or {}).get(_THREADS), torch.get_num_threads()
    then = before if isinstance(before, int) and before > 0 else now
    try:
        if then != now:
            torch.set_num_threads(then)
        yield then != now
    finally:
        torch.set_num_threads(now)


def _name(device: torch.device) -> str:
    """What computes on a device, without its number: there may be several alike."""
    if device.type == "cpu":
        return f"cpu {_cpu()}"
    describe = getattr(getattr(torch, device.type, None), "get_device_name", lambda _: "")
    return f"{device.type} {describe(device)}".strip()


def _cpu() -> str:
    try:
        with open(_CPU_INFO, encoding="utf-8", errors="replace") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, "") or platform.machine()
    except OSError:  # it is another system
        return platform.processor() or platform.machine()


def _setting(name: str) -> bool | int | str | None:
    """The value of a setting; None where this torch has none, or has it only as a newer setting that is listed too."""
    try:
        value = attrgetter(name)(torch)
        value = value() if callable(value) else value
    except (AttributeError, RuntimeError):
        return None
    return value if isinstance(value, bool | int) else str(value)
