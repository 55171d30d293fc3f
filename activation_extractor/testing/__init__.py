"""What tests of one's own need."""

from __future__ import annotations

from activation_extractor.testing._assertions import assert_activations_close, assert_no_hooks
from activation_extractor.testing._sink_tests import SinkTests, Written

__all__ = ["SinkTests", "Written", "assert_activations_close", "assert_no_hooks"]
