"""What is private of torch's compiler and this library leans on, beside `_private_torch`: an entry for each name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from activation_extractor._private_torch import present, private
from activation_extractor.errors import UnsupportedTorchError


def is_compiler_loaded() -> bool:
    """Whether this process has imported the compiler, without which nothing is compiled; importing it is slow."""
    return "torch._dynamo" in sys.modules


def refuse_inlining(function: Any, reason: str) -> None:
    """Let the compiler, where it is to trace this function and may not leave it out, give this reason."""
    function._torchdynamo_disable, function._torchdynamo_disable_msg = True, reason


# The tag of operators that a CUDA graph leaves out, which torch has since 2.8; None before.
_CUDAGRAPH_UNSAFE: Any = getattr(torch.Tag, "cudagraph_unsafe", None)
HAS_TAPS = _CUDAGRAPH_UNSAFE is not None


def operator_tags() -> tuple[Any, ...]:
    """The tags of operators that are opaque to the compiler, where torch has them."""
    return (_CUDAGRAPH_UNSAFE,) if HAS_TAPS else ()


def check_taps() -> None:
    """Make sure that this release compiles what taps are made of; raises an UnsupportedTorchError."""
    if not HAS_TAPS:
        raise UnsupportedTorchError("torch.Tag.cudagraph_unsafe", torch.__version__)


def is_exporting() -> bool:
    """Whether `torch.export` is under way.

    What torch has for it, ``torch.compiler.is_exporting``, is true in what the compiler traces too, before 2.13.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def skip_as_frame(*functions: Any) -> None:
    """Let the compiler run these functions as they are where a call of one is a frame of its own, not part of a graph.

    It imports the compiler.
    """
    importlib.import_module("torch._dynamo.eval_frame")
    skip: Callable[[Any], None] = private("_dynamo.eval_frame.skip_code")
    for function in functions:
        skip(function.__code__)


# What compiles the frames that begin now: None where nothing does; False where what is compiled already runs. In torch
# 2.6 each call lets go of an object that others hold: no release is asked that has no taps, as 2.6 does not.
_frame_compiler: Callable[[], Any] = private("_C._dynamo.eval_frame.get_eval_frame_callback")


def is_compiled_caller() -> bool:
    """Whether what runs now was called by a compiled function, outside of its graphs, whose frames are compiled too."""
    return HAS_TAPS and _frame_compiler() is not None


refuse_inlining(is_compiled_caller, "activation_extractor asks whether it is called by a compiled function")


# The compiler's stance: an object, which who sets another one keeps, to go back to it.
_STANCE = "_dynamo.eval_frame._stance"


def current_stance() -> Any:
    """The compiler's stance, where the compiler is loaded."""
    return present(private(_STANCE))


# The function that `torch.compile` puts around what it compiles; older releases have none of this name.
_COMPILED_CALL, _MOST_FRAMES = "compile_wrapper", 12


def is_compiled_call() -> bool:
    """Whether a call was made by a compiled function, also where a stance lets it run eagerly."""
    frame: FrameType | None = sys._getframe() if is_compiler_loaded() else None
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == _COMPILED_CALL:
            return True
        frame = frame.f_back
    return False
