"""The ids of rows: which come twice, and whether all are integers."""

from __future__ import annotations

from array import array

import numpy as np

from activation_extractor.errors import ArgumentError

_INT64 = range(-(2**63), 2**63)


class Ids:
    """Ids that are looked at one by one; 8 bytes of each are held.

    Attributes:
        are_converted: whether all become text, since some are text, or too large for an integer of 64 bits.
    """

    def __init__(self) -> None:
        self._digests, self._twins = array("q"), frozenset[int]()
        self._have_text = self._have_integers = self._are_large = False

    @property
    def are_converted(self) -> bool:
        return self._have_integers and (self._have_text or self._are_large)

    def add(self, row_id: str | int | None) -> None:
        """Look at the id of a row."""
        self._digests.append(hash(row_id if isinstance(row_id, str) else str(row_id)))
        if isinstance(row_id, str):
            self._have_text = True
        elif row_id is not None:
            self._have_integers = True
            self._are_large = self._are_large or row_id not in _INT64

    def find_twins(self) -> bool:
        """Whether some of the ids may be the same; `twins` then compares these."""
        digests = np.sort(np.frombuffer(self._digests, dtype=np.int64))
        self._twins = frozenset(digests[1:][digests[1:] == digests[:-1]].tolist())
        self._digests = array("q")
        return bool(self._twins)

    def twins(self) -> Twins | None:
        """What compares ids from the first row on; None where none can come twice."""
        return Twins(self._twins) if self._twins else None

    def convert(self, row_id: str | int | None) -> str | int | None:
        """An id as it is stored."""
        return str(row_id) if self.are_converted and row_id is not None else row_id

    def notes(self) -> tuple[str, ...]:
        """Why ids are text, if that is not how they stand in the input."""
        if not self.are_converted:
            return ()
        return (f"Ids are kept as text: {'some are text' if self._have_text else 'some are larger than 64 bits'}.",)


class Twins:
    """Compares those ids of a data set that may come twice."""

    def __init__(self, digests: frozenset[int]) -> None:
        self._digests, self._places = digests, dict[str, str]()

    def check(self, row_id: str | int | None, place: str) -> None:
        """Refuse an id that an earlier row has; an integer is the same as its text.

        Raises:
            ArgumentError: an earlier row has it.
        """
        if hash(str(row_id)) not in self._digests:
            return
        earlier = self._places.setdefault(str(row_id), place)
        if earlier is not place:
            advice = f"An earlier row has it: {earlier}."
            raise ArgumentError(f"the id of {place}", "be its own", row_id, advice)
