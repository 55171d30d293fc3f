"""Two processes of one process group, for tests of models that are spread over several devices."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

SECONDS = 60  # after which a test that hangs has failed


class Ranks:
    """Processes that each call the same functions, and meet in gloo; they are started when they are first needed."""

    def __init__(self, world: int = 2) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """What a function of a test file returns in each process; it is called with the rank and these arguments.

        An error in one process, or no answer in time, fails the test. The processes are not used again then.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [answer_of(pipe, seconds) for pipe in self._pipes]
        if any(error for error, _ in answers):
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers)), pytrace=False)
        return [value for _, value in answers]

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, self.world, self._folder.name), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


def answer_of(pipe: Any, seconds: float) -> tuple[str | None, Any]:
    """The error of a process, or what it returned."""
    try:
        return pipe.recv() if pipe.poll(seconds) else ("it hangs", None)
    except EOFError:
        return "it died", None


def serve(pipe: Any, rank: int, world: int, folder: str) -> None:
    """One process: calls what it is sent, in a process group, until it is killed."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            answer = None, function(rank, *args)
        except BaseException:
            answer = traceback.format_exc(), None
        sys.stdout.flush()
        pipe.send(answer)
