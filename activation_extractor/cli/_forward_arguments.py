"""The arguments that a model's forward takes."""

from __future__ import annotations

from inspect import Parameter, Signature

from torch import nn

from activation_extractor.errors import ArgumentError
from activation_extractor.layers._modules import unwrap
from activation_extractor.layers._signatures import signature_of


def is_taken(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an argument of this name.

    Models of transformers name what they take, and let further keywords pass; so a keyword of one of them counts if a
    module inside names it. Other models with ``**kwargs`` are believed to take everything.
    """
    plain = unwrap(model)
    signature = signature_of(plain)
    if signature is None or name in signature.parameters:
        return True
    if not takes(signature, name):
        return False
    if not type(plain).__module__.startswith("transformers."):
        return True
    kinds = {type(module): module for module in plain.modules()}
    return any(name in inner.parameters for inner in map(signature_of, kinds.values()) if inner)


def takes(signature: Signature, name: str) -> bool:
    """Whether a call of this signature takes a keyword of this name."""
    parameters = signature.parameters
    return name in parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())


def first_argument(model: nn.Module) -> str:
    """The name of the argument that a model takes first; what transformers calls its main input.

    Raises:
        ArgumentError: it takes none.
    """
    signature = signature_of(unwrap(model))
    name = getattr(model, "main_input_name", None) or next(iter(signature.parameters if signature else ()), None)
    if not isinstance(name, str):
        raise ArgumentError("the model", "take an argument", type(unwrap(model)).__name__)
    return name
