"""The original system's extractor: reduces what was collected and saves one file a layer, format and call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from activation_extractor._files import make_folders, replacing
from activation_extractor._tensors import to_numpy
from activation_extractor.errors import ArgumentError, ArgumentTypeError, ValueNotFoundError
from activation_extractor.extractors.intermediateExtractorBase import IntermediateExtractorBase
from activation_extractor.layers._structures import main_tensor

EmbeddingFormat = Literal["full", "mean", "FT", "LT", "custom"]
SaveMethod = Literal["numpy_compressed", "numpy"]

_FORMATS = get_args(EmbeddingFormat)
_SUFFIXES = {"numpy_compressed": ".npz", "numpy": ".npy"}


class IntermediateExtractor(IntermediateExtractorBase):
    """Extends `IntermediateExtractorBase` by reformatting and saving what was collected.

    The formats know no mask: FT and LT are the positions 0 and -1, padding or not. For masks, resuming and one store
    for a whole data set, use `activation_extractor.extract`.
    """

    def gpu_to_cpu(self) -> None:
        """Replace each entry of `intermediate_outputs` by a numpy array on the CPU.

        A structure becomes the array of its first tensor; bfloat16 and float8 become float32.

        Raises:
            ValueNotFoundError: an entry holds no tensor.
        """
        for layer, output in self.intermediate_outputs.items():
            self.intermediate_outputs[layer] = to_array(layer, output)

    def emb_reformatting(
        self,
        outputs: Any,
        emb_format: EmbeddingFormat = "full",
        sequence_axis: int = 1,
        custom_position: int | None = None,
    ) -> Any:
        """Bring one output into an embedding format.

        Args:
            outputs: an array or a tensor.
            emb_format: ``full``, the output itself; ``mean`` along the sequence; ``FT`` or ``LT``, its first or last
                position; ``custom``, the position `custom_position`.
            sequence_axis: which axis is the sequence.
            custom_position: the position that ``custom`` takes; negative from the end.

        Returns:
            An array for an array, a tensor for a tensor. A mean of bfloat16 or float16 is accumulated in float32.

        Raises:
            ArgumentError: an unknown format, an axis or position that is not there, no `custom_position`.
        """
        if not isinstance(outputs, np.ndarray | Tensor):
            raise ArgumentTypeError("outputs", "be an array or a tensor", type(outputs).__name__)
        _check_format(emb_format, custom_position)
        if emb_format == "full":
            return outputs
        if not isinstance(sequence_axis, int) or not -outputs.ndim <= sequence_axis < outputs.ndim:
            raise ArgumentError("sequence_axis", f"be an axis of shape {tuple(outputs.shape)}", sequence_axis)
        if not outputs.shape[sequence_axis]:
            shape = tuple(outputs.shape)
            raise ArgumentError("outputs", f"have a position along axis {sequence_axis}", shape, "Leave it out.")
        if emb_format == "mean":
            return _mean(outputs, sequence_axis)
        position: Any = {"FT": 0, "LT": -1}.get(emb_format, custom_position)
        length = outputs.shape[sequence_axis]
        if not -length <= position < length:
            raise ArgumentError("custom_position", f"be a position of a sequence of {length}", position)
        if isinstance(outputs, np.ndarray):
            return outputs.take(position, sequence_axis)
        return outputs.select(sequence_axis, position).clone()

    def save_outputs(
        self,
        output_folder: str | os.PathLike[str],
        output_id: str | int,
        reset: bool = False,
        move_to_cpu: bool = True,
        save_method: SaveMethod = "numpy_compressed",
        emb_formats: Sequence[EmbeddingFormat] = ("LT", "FT"),
        sequence_axis: int = 1,
        custom_position: int | None = None,
    ) -> None:
        """Save every collected output to ``{output_folder}/{emb_format}/{output_id}/{layer}.npz`` (or ``.npy``).

        An ``.npz`` holds the array under ``arr_0``. Each file appears whole or not at all.

        Args:
            output_folder: where to.
            output_id: the name of this call's folder.
            reset: first remove what earlier calls saved of these layers in these formats, and folders that this
                leaves empty; no other file.
            move_to_cpu: convert `intermediate_outputs` to arrays first, as `gpu_to_cpu`. False reduces on the device
                and leaves `intermediate_outputs` as they are.
            save_method: ``numpy_compressed`` for ``.npz``, ``numpy`` for ``.npy``.
            emb_formats: which formats, as in `emb_reformatting`.
            sequence_axis: which axis is the sequence.
            custom_position: the position that ``custom`` takes.

        Raises:
            ArgumentError: a value that cannot be used, or an `output_id` or layer name that would leave the folder.
            ValueNotFoundError: an output holds no tensor.
            StoreError: a file cannot be written.
        """
        formats: list[Any] = [emb_formats] if isinstance(emb_formats, str) else list(emb_formats)
        if not formats:
            raise ArgumentError("emb_formats", f"name at least one of {', '.join(_FORMATS)}", emb_formats)
        for emb_format in formats:
            _check_format(emb_format, custom_position)
        if save_method not in _SUFFIXES:
            raise ArgumentError("save_method", f"be one of {', '.join(map(repr, _SUFFIXES))}", save_method)
        if not isinstance(output_id, str | int):
            raise ArgumentTypeError("output_id", "be a string or an integer", output_id)
        folder, name = Path(output_folder), _check_part("output_id", str(output_id))
        if move_to_cpu:
            self.gpu_to_cpu()
        saved = {
            (emb_format, _check_part("a layer's name", layer)): to_array(
                layer, self.emb_reformatting(_value(layer, output), emb_format, sequence_axis, custom_position)
            )
            for layer, output in self.intermediate_outputs.items()
            for emb_format in formats
        }
        if reset:
            self._remove_saved(folder, formats)
        for (emb_format, layer), array in saved.items():
            _write(folder / emb_format / name / (layer + _SUFFIXES[save_method]), array)

    def _remove_saved(self, folder: Path, formats: Sequence[str]) -> None:
        names = {layer + suffix for layer in self.layer_list for suffix in _SUFFIXES.values()}
        for format_folder in filter(_is_folder, [folder / emb_format for emb_format in formats]):
            for call_folder in filter(_is_folder, list(format_folder.iterdir())):
                saved = [path for path in call_folder.iterdir() if path.name in names and path.is_file()]
                for path in saved:
                    path.unlink()
                if saved and not any(call_folder.iterdir()):
                    call_folder.rmdir()


def to_array(layer: str, output: Any) -> np.ndarray[Any, Any]:
    """A layer's output as an array: its first tensor, on the CPU, bfloat16 and float8 as float32.

    Raises:
        ValueNotFoundError: it holds no tensor.
    """
    value = _value(layer, output)
    return value if isinstance(value, np.ndarray) else to_numpy(value)


def _value(layer: str, output: Any) -> np.ndarray[Any, Any] | Tensor:
    value = output if isinstance(output, np.ndarray) else main_tensor(output)
    if value is None:
        raise ValueNotFoundError(layer, output)
    return value


def _check_format(emb_format: str, custom_position: int | None) -> None:
    if emb_format not in _FORMATS:
        raise ArgumentError("emb_format", f"be one of {', '.join(_FORMATS)}", emb_format)
    if emb_format == "custom" and (not isinstance(custom_position, int) or isinstance(custom_position, bool)):
        raise ArgumentError("custom_position", "be an integer for emb_format='custom'", custom_position)


def _check_part(what: str, part: str) -> str:
    """`part`, unless it is no name of a file in a folder."""
    if part in ("", ".", "..") or any(character in part for character in "/\\\0"):
        raise ArgumentError(what, "be a plain file name", part, "Leave out path separators.")
    return part


def _mean(outputs: Any, axis: int) -> Any:
    if isinstance(outputs, np.ndarray):
        if not np.issubdtype(outputs.dtype, np.inexact):
            return outputs.mean(axis, dtype=np.float32)
        return outputs.mean(axis, dtype=np.promote_types(outputs.dtype, np.float32)).astype(outputs.dtype, copy=False)
    if not (outputs.is_floating_point() or outputs.is_complex()):
        return outputs.float().mean(axis)
    return outputs.mean(axis, dtype=torch.promote_types(outputs.dtype, torch.float32)).to(outputs.dtype)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()  # nothing behind a link is removed


def _write(path: Path, array: np.ndarray[Any, Any]) -> None:
    make_folders(path.parent)
    with replacing(path) as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, array)
        else:
            np.save(file, array, allow_pickle=False)
