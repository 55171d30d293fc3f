"""``activation-extractor extract --engine ray``: the command as tasks of Ray, which share the units of one store."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from activation_extractor._arguments import check_size
from activation_extractor._display import plural, short_path
from activation_extractor.cli._estimate import check_out
from activation_extractor.cli._fresh import set_aside
from activation_extractor.cli._job import Job
from activation_extractor.cli._terminal import warn
from activation_extractor.errors import ArgumentError, MissingExtraError
from activation_extractor.store import Store, open_store

_TRIES = 3  # of a task whose worker dies


def execute_on_ray(job: Job, workers: int | None) -> Store:
    """Run a job as so many tasks of Ray, by default as many as there are CPUs, or GPUs where these are asked for.

    Each task is one rank of `extract`: it computes its own units, then those that are still missing, so that a task
    whose worker dies costs nothing but its time. Ray places the tasks and tries them again. A cluster that is running
    is used; otherwise one begins on this machine, and ends with the command.

    Raises:
        ArgumentError: an option is not for several processes.
        MissingExtraError: ray is not installed.
        Exception: what a task raises.
    """
    if workers is not None:
        check_size("workers", workers)
    _check(job)
    check_out(job.out, job.codec, resume=job.resume)
    if not job.resume and (aside := set_aside(job.out)) is not None:
        warn(f"The earlier store is in {short_path(aside)!r} now.")
    job = replace(job, resume=True)
    with _cluster() as ray:
        needs_gpu = str(job.load.get("device") or "").startswith("cuda")
        count = workers or max(1, int(ray.cluster_resources().get("GPU" if needs_gpu else "CPU", 1)))
        task = ray.remote(_work).options(
            num_cpus=_cpus(ray, count), num_gpus=int(needs_gpu), max_retries=_TRIES, scheduling_strategy="SPREAD"
        )
        warn(f"{plural(count, 'task')} of Ray share the work.")
        _wait(ray, [task.remote(job, str(Path.cwd()), rank, count) for rank in range(count)])
    return open_store(job.out)


def _check(job: Job) -> None:
    """Refuse what only one process can do."""
    if job.append:
        raise ArgumentError("append", "be left out with --engine ray", True, "Add rows with one process.")
    if job.read.get("skip_bad_rows") is not None:
        advice = "One process writes that file: run without --engine ray first, which lists the rows."
        raise ArgumentError("skip_bad_rows", "be left out with --engine ray", str(job.read["skip_bad_rows"]), advice)
    if job.input == "-":
        raise ArgumentError("input", "be a file with --engine ray", "-", "Each worker reads it.")
    if find_spec("ray") is None:
        raise MissingExtraError("--engine ray", "ray", "ray")


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, as the program has it; or else begun, and ended."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    ray.init(logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def _cpus(ray: Any, count: int) -> int:
    """How many CPUs a task may have, so that all of them run at once: those are also the threads of torch."""
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)
    return max(1, int(min(ray.cluster_resources().get("CPU", 1) // count, largest)))


def _wait(ray: Any, tasks: list[Any]) -> None:
    """Wait for all tasks; what one raises ends the others, a worker that died too often ends nothing by itself."""
    died: list[Exception] = []
    left = list(tasks)
    try:
        while left:
            (done,), left = ray.wait(left)
            try:
                said = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                died.append(error)
            else:
                if done == tasks[0]:
                    warn(said.rstrip("\n"))
    finally:
        for task in left:
            ray.cancel(task, force=True)
    if len(died) == len(tasks):
        raise died[0]


def _work(job: Job, folder: str, rank: int, count: int) -> str:
    """One rank of a job, in a worker; returns what it said to its user."""
    if Path(folder).is_dir():
        os.chdir(folder)  # models and inputs are named from there
    said = io.StringIO()
    with redirect_stderr(said), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Each of the .* ranks goes through all batches")  # as is meant here
        job.execute(share=(rank, count), progress=False)
    return said.getvalue()
