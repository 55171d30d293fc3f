"""A whole data set through a model, into a store, and on from where it ended."""

from __future__ import annotations

from activation_extractor.runs._extract import extract
from activation_extractor.runs._length_batches import length_batches

__all__ = ["extract", "length_batches"]
