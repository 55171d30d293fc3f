"""The demo: a real pretrained model, real sentences, every block into a store, and a look at what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation_extractor._format._codecs import SAFETENSORS
from activation_extractor.cli._estimate import check_out
from activation_extractor.examples import minilm
from activation_extractor.layers import blocks
from activation_extractor.runs import extract
from activation_extractor.store import Column, Store

_BATCH_ROWS = 32


def run_demo(out: Path) -> Store:
    """Extract mean and last token of every block of all-MiniLM-L6-v2 for the sentences that come with the package.

    The model is read from its wheel; nothing is fetched. Called again with the same folder, it goes on where it ended.

    Raises:
        MissingExtraError: transformers or the package with the model is not installed.
        StoreError: the folder holds something else.
    """
    check_out(out, SAFETENSORS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    model, tokenizer = minilm()
    batches = list(_batches(tokenizer, read_sentences()))
    kept = ["tokens", "book"]
    return extract(model, batches, blocks(model), reduce=["mean", "last"], out=out, ids="citation", keep=kept)


def read_sentences() -> list[dict[str, str]]:
    """The sentences that come with the package: ``citation``, ``text`` and ``book`` of 500 Bible verses."""
    lines = files("activation_extractor").joinpath("data/verses.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def nearest(embeddings: Tensor, row: int, count: int) -> list[tuple[int, float]]:
    """The rows of ``(rows, features)`` most similar to `row`, itself left out: numbers and cosine similarities."""
    normal = torch.nn.functional.normalize(embeddings.float(), dim=1)
    similarity = normal @ normal[row]
    similarity[row] = -2.0
    best = similarity.topk(count)
    return [(int(index), float(value)) for value, index in zip(best.values, best.indices, strict=True)]


def neighbour_rows(column: Column, sentences: Sequence[dict[str, str]], wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """Table rows of the nearest neighbours of some citations: sentence, its neighbour, similarity."""
    embeddings = column.torch()
    citations = [sentence["citation"] for sentence in sentences]
    rows: list[tuple[str, ...]] = []
    for citation in wanted:
        row = citations.index(citation)
        for index, value in nearest(embeddings, row, 2):
            rows.append((_quoted(sentences[row]), _quoted(sentences[index]), f"{value:.2f}"))
    return rows


def _batches(tokenizer: Any, sentences: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(sentences), _BATCH_ROWS):
        rows = sentences[start : start + _BATCH_ROWS]
        encoded = dict(tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt"))
        texts = {name: [row[name] for row in rows] for name in ("citation", "book")}
        yield {**encoded, **texts, "tokens": encoded["attention_mask"].sum(1)}


def _quoted(sentence: dict[str, str]) -> str:
    return f"{sentence['citation']}: {sentence['text']}"
