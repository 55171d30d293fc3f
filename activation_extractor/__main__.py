"""``python -m activation_extractor`` is the command line."""

from __future__ import annotations

from activation_extractor.cli import main

main()
