"""``activation-extractor extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from activation_extractor._display import dtype_name
from activation_extractor.cli._terminal import how_to_read, is_silent, say, say_json


def extract(
    model: Annotated[str, typer.Option(help="A folder, a transformers id, or package.module:factory.")],
    input: Annotated[
        str, typer.Option(help="A .txt, .jsonl, .csv, .parquet, .fasta or .npy file, a folder of them or images, or -.")
    ],
    out: Annotated[
        Path, typer.Option(help="A new or empty folder for the store, or that of an earlier run; or s3://bucket/name.")
    ],
    layers: Annotated[
        list[str] | None, typer.Option(help="A name or pattern; repeatable. By default every block.")
    ] = None,
    reduce: Annotated[
        list[str] | None, typer.Option(help="mean, first, last, max or full; repeatable. By default mean.")
    ] = None,
    sequence_axis: Annotated[
        list[int] | None,
        typer.Option(
            help="What to reduce over where activations are not (batch, seq, features); repeatable: 2 and 3 for images."
        ),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(help="Which positions are real: an input's name, none, or PATTERN=NAME for layers; repeatable."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    path_column: Annotated[str | None, typer.Option(help="The column with paths of images or sounds.")] = None,
    id_column: Annotated[str | None, typer.Option(help="The column with the row ids.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to store as well; repeatable.")] = None,
    input_format: Annotated[str | None, typer.Option(help="What the input is, where its name says nothing.")] = None,
    input_encoding: Annotated[str | None, typer.Option(help="Of text; by default UTF-8.")] = None,
    separator: Annotated[str | None, typer.Option(help="Between the cells of a .csv file; by default a comma.")] = None,
    format: Annotated[Literal["safetensors", "npz", "npy"], typer.Option(help="Of the shards.")] = "safetensors",
    store_dtype: Annotated[
        Literal["computed", "float16", "bfloat16", "float32"], typer.Option(help="Of what is stored.")
    ] = "computed",
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch; by default 32.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, padding counted.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text at most; by default as many as the model takes.")
    ] = None,
    long: Annotated[
        Literal["cut", "error", "windows"],
        typer.Option(help="What becomes of texts with more tokens; windows that overlap are pooled as one row."),
    ] = "cut",
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default as many as the model takes.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from the beginning of a window to that of the next; by default half of it."),
    ] = None,
    upper: Annotated[
        bool, typer.Option("--upper", help="Read text in upper case, as of soft-masked sequences.")
    ] = False,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels of an image at most; by default 178,956,970.")] = None,
    skip_bad_rows: Annotated[
        Path | None, typer.Option(help="List rows that cannot be read or run in this file, and go on without them.")
    ] = None,
    rows_per_unit: Annotated[
        int | None,
        typer.Option(
            help="Rows written at once, and lost when stopped; by default 1024, or fewer if more than 64 MiB."
        ),
    ] = None,
    skip_special_tokens: Annotated[
        bool,
        typer.Option("--skip-special-tokens", help="Leave BOS, EOS, CLS and SEP out of what is pooled and stored."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Go on with the store in the folder, or begin another and rename that one."
        ),
    ] = True,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add the rows that are new in an input that grew to the store in the folder."),
    ] = False,
    share: Annotated[
        str,
        typer.Option(
            help="The part of the work that this process does: R/N as rank R (from 0) of N, none to share nothing, or "
            "auto for what torchrun, Slurm or MPI say."
        ),
    ] = "auto",
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Leave out what comes behind the last layer wanted.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    engine: Annotated[
        Literal["ray"] | None, typer.Option(help="Run in several processes, on this machine or a cluster of Ray.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="How many, with --engine; by default one for each CPU or GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run a model over a data set and store what its layers compute.

    Run again, the same command goes on where it ended. Rows of text are sorted by length within windows, so that little
    is padded, and stand in the store in the order of the input.

    Examples:

    \b
        activation-extractor extract --model gpt2 --input texts.txt --out out
        activation-extractor extract --model ./esm --input proteins.fasta --skip-special-tokens --out out
        activation-extractor extract --model my.models:build --input x.npy --reduce full --layers 'stages.*' --out out
        activation-extractor extract --model gpt2 --input texts.txt --out out --engine ray --workers 4
    """
    options = dict(locals())
    from activation_extractor._creation import check_place
    from activation_extractor.cli._job import Job

    options["out"] = place = check_place("out", out)
    store = _executed(Job.of(options), engine, workers, share)
    if as_json:
        say_json(_summary(store))
    else:
        say(f"{store!r}\n{how_to_read(place, next(iter(store)))}")


def _executed(job: Any, engine: str | None, workers: int | None, share: str) -> Any:
    """The store of a job, which ran in this process or on an engine."""
    if engine is not None:
        from activation_extractor.cli._ray import execute_on_ray

        return execute_on_ray(job, workers)
    if workers is not None:
        from activation_extractor.errors import ArgumentError

        raise ArgumentError("workers", "be left out without --engine ray", workers)
    from activation_extractor.cli._extraction import read_share

    part = None if share == "auto" and job.append else read_share(share, resume=job.resume)
    is_silent.set(part is not None and part[0] > 0)
    return job.execute(share=part)


def _summary(store: Any) -> dict[str, Any]:
    columns = [
        {"layer": layer, "reducer": reducer, "shape": column.shape, "dtype": dtype_name(column.dtype)}
        for (layer, reducer), column in ((pair, store[pair]) for pair in store.pairs)
    ]
    return {"path": str(store.path), "rows": store.rows, "bytes": store.nbytes, "columns": columns}
