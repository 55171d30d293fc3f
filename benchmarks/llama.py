"""A model of real size: a Llama-shaped decoder of about 1 billion parameters in bfloat16, with random weights.

Extraction keeps a GPU busy: capturing has to hide behind the forwards. Decoding, one token of one sample at a time, is
bound by launches: there each kernel that is launched beside the model's own is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from activation_extractor import capture
from activation_extractor.sinks import Ragged, Sink, Step
from activation_extractor.sinks._background import Background
from activation_extractor.sinks._store_writer import QUEUE_BYTES
from activation_extractor.sinks._transfer import Arrival, Transfer
from benchmarks.extraction import POOLED, extract_into, forward_alone, plain_copy, plain_write
from benchmarks.measure import Case, Group, Run, UnavailableError, require
from benchmarks.models import token_batches
from benchmarks.sizes import Decoder, Size
from benchmarks.storage import in_folder
from benchmarks.systems import Store, prepared, ready, store_first_clone

LAYERS = "layers.*"
_FEWEST = 2  # batches of the extraction that is subtracted
_PROMPT = 8


def decoding(size: Size) -> Iterator[Case]:
    """Every layer in every step of a greedy loop of batch 1, one block around all of it, the last value kept."""
    check(size)
    tokens = size.decoder.new_tokens
    bare, hooked, captured = (
        partial(prepared, partial(_loop, size, way)) for way in (decode, decode_hooked, decode_captured)
    )
    yield Case(
        name="llama.decoding",
        about=f"a token of a greedy loop of batch 1, {size.decoder.layers} layers captured, beside hooks that clone",
        ours=captured,
        reference=hooked,
        calls=tokens,
        loops=1,
        target=1.1,
        most_rounds=31,
    )
    yield Case(
        name="llama.decoding_added",
        about="the same above the bare loop: one captured call of one token",
        ours=captured,
        reference=hooked,
        floor=bare,
        calls=tokens * size.decoder.layers,
        loops=1,
        most_rounds=31,
    )


def full(size: Size) -> Iterator[Case]:
    """Every layer whole to the host and no further, beside the forwards or a plain pinned copy, whichever is longer."""
    batches, nbytes = _batches(size, size.decoder.whole_batches), size.decoder.layers * layer_bytes(size.decoder)
    yield Case(
        name="llama.full",
        about=f"a batch, {size.decoder.layers} layers whole to the host, beside the forwards or a pinned copy",
        ours=partial(prepared, lambda: partial(forward_captured, model(size), batches, size.device)),
        reference=partial(prepared, lambda: partial(forward_alone, model(size), batches, size.device)),
        second_reference=partial(prepared, partial(plain_copy, nbytes, size.device, len(batches))),
        calls=len(batches),
        loops=1,
        target=1.1,
        most_rounds=15,
    )


def pooled(size: Size) -> Iterator[Case]:
    """Mean and last token of every layer to disk: what a batch adds to an extraction that has begun anyway.

    What a run pays once (fingerprints, the manifest, the last unit) is seconds' work in hours, and several per cent of
    a run that is short enough to be measured, so that a run of two batches is subtracted on both sides.
    """
    batches, few = _batches(size, size.decoder.batches), _batches(size, _FEWEST)

    def extracting(some: Sequence[Any]) -> Callable[..., object]:
        return lambda folder: extract_into(model(size), some, folder, reduce=POOLED, layers=LAYERS)

    def alone(some: Sequence[Any]) -> Run:
        return lambda: forward_alone(model(size), some, size.device)

    yield Case(
        name="llama.pooled",
        about=f"a further batch, mean and last of {size.decoder.layers} layers to the disk, beside its forward",
        ours=partial(in_folder, extracting(batches)),
        reference=partial(ready, alone(batches)),
        floor=partial(in_folder, extracting(few)),
        reference_floor=partial(ready, alone(few)),
        calls=len(batches) - len(few),
        loops=1,
        target=1.02,
        most_rounds=9,
    )


def one_layer(size: Size) -> Iterator[Case]:
    """One layer whole to disk, as sparse autoencoders are trained on, beside the forwards or a plain write."""
    batches, middle = _batches(size, size.decoder.whole_batches), f"layers.{size.decoder.layers // 2}"
    yield Case(
        name="llama.one_layer_to_disk",
        about="a batch, one layer whole to the disk, beside the forwards or a plain write of as much",
        ours=partial(in_folder, lambda folder: extract_into(model(size), batches, folder, layers=middle)),
        reference=partial(prepared, lambda: partial(forward_alone, model(size), batches, size.device)),
        second_reference=plain_write(len(batches) * layer_bytes(size.decoder)),
        calls=len(batches),
        loops=1,
        most_rounds=9,
    )


LLAMA: list[Group] = [("llama", decoding), ("llama", full), ("llama", pooled), ("llama", one_layer)]


# -- the model --------------------------------------------------------------------------------------------------------


@lru_cache(1)
def model(size: Size) -> Any:
    """The decoder, made once and where it runs."""
    import transformers

    shape = size.decoder
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.inner_width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.seq + shape.new_tokens + _PROMPT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with size.device:  # where weights are made and filled: on one core that takes half a minute
        return transformers.LlamaModel(config).eval().to(torch.bfloat16)


def check(size: Size) -> None:
    """Refuse where the model cannot run, or not in a time that anybody would wait.

    Raises:
        UnavailableError: transformers is not installed, or the model of full size would run on a CPU.
    """
    require("transformers")
    if not size.has_accelerator and size.decoder == Decoder():
        raise UnavailableError("needs an accelerator: on a CPU a batch takes a minute")


def layer_bytes(shape: Decoder) -> int:
    """What one layer returns for a batch, in bfloat16."""
    return shape.rows * shape.seq * shape.width * 2


def _batches(size: Size, count: int) -> list[dict[str, Tensor]]:
    check(size)
    shape = size.decoder
    return token_batches(count, shape.rows, shape.seq, shape.vocabulary)


def _loop(size: Size, way: Callable[[Any, Tensor, int], None]) -> Run:
    prompt = torch.arange(_PROMPT, device=size.device)[None]  # (1, seq)
    return partial(way, model(size), prompt, size.decoder.new_tokens)


# -- systems ----------------------------------------------------------------------------------------------------------


def decode(decoder: Any, prompt: Tensor, new_tokens: int) -> None:
    """A greedy loop with a cache; the next token stays on the device, so that nothing is waited for."""
    token, cache = prompt, _new_cache(decoder)
    with torch.inference_mode():
        for _ in range(new_tokens):
            hidden = decoder(input_ids=token, use_cache=True, **cache).last_hidden_state
            logits = hidden[:, -1] @ decoder.embed_tokens.weight.T  # (1, vocabulary)
            token = logits.argmax(-1, keepdim=True)


def _new_cache(decoder: Any) -> dict[str, Any]:
    """A cache that forwards add to, under the name that this version of transformers has for it."""
    import transformers

    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    return {name: transformers.DynamicCache()}


def decode_hooked(decoder: Any, prompt: Tensor, new_tokens: int) -> None:
    """The loop with hooks by hand, each of which keeps a copy of the last call."""
    store: Store = {}
    with ExitStack() as handles:
        for index, layer in enumerate(decoder.layers):
            handles.enter_context(layer.register_forward_hook(store_first_clone(store, f"layers.{index}")))
        decode(decoder, prompt, new_tokens)


def decode_captured(decoder: Any, prompt: Tensor, new_tokens: int) -> None:
    """The loop in one block, which keeps the last call of each layer."""
    with capture(decoder, LAYERS):
        decode(decoder, prompt, new_tokens)


def forward_captured(decoder: nn.Module, batches: Sequence[Any], device: torch.device) -> None:
    """The forwards in a block whose sink lets go of what has arrived."""
    with capture(decoder, LAYERS, sink=Discarding()):
        forward_alone(decoder, batches, device)


class Discarding(Sink):
    """Takes what a store would take, as a store takes it, and drops it when it has arrived on the host."""

    reads_later = True

    def __init__(self) -> None:
        self.nbytes = 0
        self._transfer, self._background = Transfer(), Background(QUEUE_BYTES)

    def write(self, step: Step) -> None:
        """Begin the copies of a step; waits while more than a store may hold is under way."""
        whole = {name: one.values if isinstance(one, Ragged) else one for (name, _), one in step.values.items()}
        arrival, nbytes = Arrival(), sum(one.nbytes for one in whole.values())
        hosts = self._transfer.to_host(whole, arrival)

        def arrive() -> None:
            arrival.wait()
            self.nbytes += sum(one.nbytes for one in hosts.values())
            hosts.clear()

        self._background.submit(arrive, nbytes, reserved_bytes=nbytes)

    def close(self) -> None:
        """Wait until everything has arrived."""
        self._background.finish()
