"""``activation-extractor extract``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from activation_extractor._display import dtype_name
from activation_extractor.cli._terminal import how_to_read, say, say_json, warn
from activation_extractor.errors import StoreError


def extract(
    model: Annotated[str, typer.Option(help="A folder, a transformers id, or package.module:factory.")],
    input: Annotated[
        str, typer.Option(help="A .txt, .jsonl, .csv, .parquet, .fasta or .npy file, a folder of images, or - (lines).")
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the store, or that of an earlier run.")],
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
    text_column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    id_column: Annotated[str | None, typer.Option(help="The column with the row ids.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A column to store as well; repeatable.")] = None,
    format: Annotated[Literal["safetensors", "npz", "npy"], typer.Option(help="Of the shards.")] = "safetensors",
    store_dtype: Annotated[
        Literal["computed", "float16", "bfloat16", "float32"], typer.Option(help="Of what is stored.")
    ] = "computed",
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch; by default 32.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, padding counted.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut texts that have more tokens.")] = None,
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
        bool, typer.Option("--resume/--fresh", help="Resume the run of an earlier store, or take a new folder only.")
    ] = True,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Leave out what comes behind the last layer wanted.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
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
    """
    from activation_extractor.cli._estimate import check_out, check_room, estimate
    from activation_extractor.cli._feed import POOLING_MASK, make_feed
    from activation_extractor.cli._models import DTYPES, load_model
    from activation_extractor.cli.inputs import open_source
    from activation_extractor.layers import blocks
    from activation_extractor.runs import extract as run
    from activation_extractor.store import open_store

    check_out(out, resume=resume)
    source = open_source(input, text_column=text_column, id_column=id_column, keep=keep or ())
    loaded = load_model(model, trust_remote_code=trust_remote_code, dtype=dtype, device=device)
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens, "max_length": max_length}
    feed = make_feed(source, loaded.model, loaded.prepare, skip_special_tokens=skip_special_tokens, **sizes)
    for note in (*loaded.notes, *source.notes, *feed.notes):
        warn(note)
    selection = layers or blocks(loaded.model)
    options: dict[str, Any] = {"reduce": reduce or ["mean"], "stop_early": stop_early, "dtype": DTYPES.get(store_dtype)}
    if sequence_axis:
        options["sequence_axis"] = tuple(sequence_axis)
    if skip_special_tokens:
        options["pooling_mask"] = POOLING_MASK
    expected = estimate(loaded.model, feed, selection, source.rows, format=format, **options)
    warn(str(expected))
    check_room(out, expected.nbytes, resume=resume)
    feed.window_rows = options["rows_per_unit"] = rows_per_unit or expected.unit_rows
    try:
        store = run(loaded.model, feed, selection, out=out, format=format, resume=resume, **options, **feed.options)
    except KeyboardInterrupt:
        done = 0
        with suppress(StoreError):  # a run that ended before its first unit left no store
            done = open_store(out).rows
        warn(f"Stopped. {done:,} rows are in {str(out)!r}; the same command goes on from there.")
        raise  # typer ends with the code of an interrupt
    if not as_json:
        say(f"{store!r}\n{how_to_read(out, next(iter(store)))}")
        return
    columns = [
        {"layer": layer, "reducer": reducer, "shape": column.shape, "dtype": dtype_name(column.dtype)}
        for (layer, reducer), column in ((pair, store[pair]) for pair in store.pairs)
    ]
    say_json({"path": str(store.path), "rows": store.rows, "bytes": store.nbytes, "columns": columns})
