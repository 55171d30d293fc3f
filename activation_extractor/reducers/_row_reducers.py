"""What reducers are told of each row, by themselves or by the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from activation_extractor._streams import current_stream
from activation_extractor.errors import ArgumentTypeError


class RowFields:
    """What the batch that is run holds for reducers, set anew before each call of the model.

    Attributes:
        names: of the fields that reducers need.
        now: the fields of the batch, by name.
        made: what reducers have made of them, by what it depends on.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.now: Mapping[str, Any] = {}
        self.made: dict[Any, tuple[Any, Tensor]] = {}

    def begin(self, fields: Mapping[str, Any]) -> None:
        """The next batch has these fields."""
        self.now, self.made = fields, {}


class RowReducer:
    """A reducer that is told something of each row: itself, or by the name of a field of the batch.

    To a fingerprint it is its name: the values are of a batch, as its inputs are.

    Attributes:
        fields: the names of the fields that it needs.
        is_linear: whether it may as well come before a mean over layers.
    """

    def __init__(self, name: str, given: Sequence[Any], *, is_linear: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = "activation_extractor.reducers"
        self.fields = tuple(value for value in given if isinstance(value, str))
        self.is_linear = is_linear
        self._batch: RowFields | None = None

    @property
    def lacks_fields(self) -> bool:
        """Whether it names fields, and was not told where they are."""
        return bool(self.fields) and self._batch is None

    def of_batch(self, batch: RowFields) -> RowReducer:
        """The same reducer, which takes its fields from there."""
        twin = copy.copy(self)
        twin._batch = batch
        return twin

    def _value(self, given: Any) -> Any:
        """What was given, or what the batch holds under this name."""
        if not isinstance(given, str):
            return given
        assert self._batch is not None  # refused at the door
        return self._batch.now[given]

    def _once(self, activation: Tensor, mask: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of the batch's fields, once for all layers of one shape and mask: it waits for a device.

        Values that the user holds may change between two calls of the model; those are asked for each time.
        """
        if self._batch is None or not self.fields or activation.is_nested:
            return make()
        device, seen = activation.device, (*activation.shape[:2], activation.dtype)
        key = (id(self), id(mask), *seen, device, current_stream(device))
        if key not in self._batch.made:
            self._batch.made[key] = mask, make()  # while the mask lives, no other one has its id
        return self._batch.made[key][1]


def numbers_of(what: str, given: Any, kind: Literal["integers", "numbers"]) -> Tensor:
    """A tensor of what may be one, a sequence or an array.

    Raises:
        ArgumentTypeError: it holds something else.
    """
    condition = f"hold {kind}"
    try:
        numbers = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(what, condition, given) from error
    is_integer = not (numbers.dtype.is_floating_point or numbers.dtype.is_complex or numbers.dtype == torch.bool)
    if not (is_integer or (kind == "numbers" and not numbers.dtype.is_complex)):
        raise ArgumentTypeError(what, condition, given)
    return numbers.to(torch.int64) if kind == "integers" else numbers
