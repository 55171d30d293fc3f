"""What ``activation-extractor extract`` is asked for, as data that reaches another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_extractor._format._codecs import CODECS, Codec
from activation_extractor.cli._extraction import Extraction
from activation_extractor.store import Store

_READ = ("text_column", "path_column", "id_column", "separator", "max_pixels", "skip_bad_rows")
_LOAD = ("trust_remote_code", "dtype", "device")
_PREPARE = ("batch_size", "max_tokens", "max_length", "skip_special_tokens", "upper", "long", "window", "stride")
_RUN = ("mask", "stop_early", "format", "store_dtype", "rows_per_unit")


@dataclass(frozen=True)
class Job:
    """A run over a data set, into a folder.

    Attributes:
        out: the folder.
        resume: whether to go on with the store there.
        append: whether to add rows to it.
        input: the name of the input; `read` holds the options of `Extraction.read`.
        model: the name of the model; `load` holds the options of `Extraction.load`.
        prepare: the options of `Extraction.prepare`.
        layers: which layers; `run` holds the other options of `Extraction.run`.
    """

    out: Path
    resume: bool
    append: bool
    input: str
    read: Mapping[str, Any]
    model: str
    load: Mapping[str, Any]
    prepare: Mapping[str, Any]
    layers: Any
    run: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Job:
        """The job that the options of the command stand for, by their names."""

        def some(names: tuple[str, ...], **others: Any) -> dict[str, Any]:
            return {name: options[name] for name in names} | others

        axes = options["sequence_axis"]
        return cls(
            out=options["out"],
            resume=options["resume"],
            append=options["append"],
            input=options["input"],
            read=some(
                _READ,
                keep=options["keep"] or (),
                format=options["input_format"],
                encoding=options["input_encoding"],
            ),
            model=options["model"],
            load=some(_LOAD),
            prepare=some(_PREPARE),
            layers=options["layers"],
            run=some(_RUN, reduce=options["reduce"] or ["mean"], sequence_axis=tuple(axes) if axes else None),
        )

    @property
    def codec(self) -> Codec:
        """The format of its shards."""
        return CODECS[self.run["format"]]

    def execute(self, **sharing: Any) -> Store:
        """Run it in this process, with further options of `extract`; raises what the parts of `Extraction` raise."""
        extraction = Extraction(self.out, self.codec, resume=self.resume, append=self.append)
        extraction.read(self.input, **self.read)
        extraction.load(self.model, **self.load)
        extraction.prepare(**self.prepare)
        return extraction.run(self.layers, sharing=sharing, **self.run)
