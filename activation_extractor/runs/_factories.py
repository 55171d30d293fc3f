"""Models that a function of the user's makes, named as ``package.module:factory``."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

from torch import nn

from activation_extractor._display import close_matches, one_line
from activation_extractor.errors import ActivationError, ArgumentError, ArgumentTypeError


def is_factory_name(name: str) -> bool:
    """Whether a text is written as ``package.module:factory``."""
    module_name, _, attribute = name.partition(":")
    return all(part.isidentifier() for part in (*module_name.split("."), *attribute.split(".")))


def find_object(argument: str, name: str) -> Any:
    """What ``package.module:name`` names; the current directory stays importable until the process ends.

    Raises:
        ArgumentError: there is no such module, it fails, or it lacks the name.
    """
    here, module_name = str(Path.cwd()), name.partition(":")[0]
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; a model may import more of its own when it runs
    importlib.invalidate_caches()
    try:
        return pkgutil.resolve_name(name)
    except ActivationError:
        raise
    except Exception as error:
        module = sys.modules.get(module_name)
        if not isinstance(error, AttributeError) or module is None:  # the module itself failed
            raise ArgumentError(argument, "name a module that can be imported", name, f"{one_line(error)}.") from error
        advice = close_matches(name.partition(":")[2], dir(module))
        raise ArgumentError(argument, f"name something that {module_name!r} holds", name, advice) from None


def built(factory: Any, name: str) -> tuple[nn.Module, Any]:
    """The model that a factory returns, and what prepares its batches, or None.

    Raises:
        ArgumentError: it is no function, or raises.
        ArgumentTypeError: it returns something else.
    """
    if not callable(factory) or isinstance(factory, nn.Module):
        advice = f"It is a {type(factory).__name__}."
        raise ArgumentError("model", "name a function that returns the model", name, advice)
    try:
        result = factory()
    except ActivationError:  # its text says already what to do
        raise
    except Exception as error:
        raise ArgumentError("model", "name a factory that runs", name, f"It raised {one_line(error)}.") from error
    model, prepare = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not (prepare is None or callable(prepare)):
        condition = "be a torch.nn.Module, or one and what prepares its batches"
        raise ArgumentTypeError(f"what {name!r} returns", condition, result)
    return model, prepare
