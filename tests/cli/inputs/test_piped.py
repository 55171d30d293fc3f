from __future__ import annotations

import gc
import io
import sys
from types import SimpleNamespace

from activation_extractor.cli.inputs._files import piped


def test_the_copy_of_a_pipe_is_closed_and_removed_with_what_reads_it_also_in_a_circle_of_references(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ACD\nEF\n")))
    file = piped("-", None)
    path, circle = file.path, []
    circle += [circle, file]
    assert path.read_bytes() == b"ACD\nEF\n"
    del file, circle
    gc.collect()  # a file that was still open would be a ResourceWarning, which is an error here
    assert not path.exists()
