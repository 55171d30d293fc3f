"""Threads of tests: they are waited for, and given up where they hang."""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE_SECONDS = 10  # before a test that hangs is given up


def waiting_for(gate: threading.Event) -> Callable[[], None]:
    return lambda: gate.wait(PATIENCE_SECONDS) or None


def on_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def is_blocked(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


def ends(thread: threading.Thread) -> bool:
    thread.join(PATIENCE_SECONDS)
    return not thread.is_alive()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "activation_extractor writer"]
