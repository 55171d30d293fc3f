"""A model that transformers makes tensor parallel, over two processes."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from releases import release
from transformers import LlamaConfig, LlamaForCausalLM

from activation_extractor import capture
from activation_extractor.errors import PartError

pytestmark = pytest.mark.skipif(release("transformers") < (5, 20), reason="older releases hand out parts in other ways")
IDS = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([[6], [4], [1], [5]])).long()
CUT = ["mlp.gate_proj", "mlp.act_fn", "self_attn.q_proj"]
WHOLE = ["", "mlp", "mlp.down_proj", "self_attn", "self_attn.o_proj", "input_layernorm"]


def named(layers):
    return [f"model.layers.1.{layer}".rstrip(".") for layer in layers]


def tensor_parallel(rank, folder, port):
    """What the layers give: each that is cut by itself, gathered and not."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    for layer in named(CUT):
        with torch.no_grad(), pytest.raises(PartError), capture(model, layer):
            model(input_ids=IDS, attention_mask=MASK)
    with torch.no_grad(), capture(model, named(WHOLE), reduce="mean") as acts:
        model(input_ids=IDS, attention_mask=MASK)
    with torch.no_grad(), capture(model, named(CUT), reduce="mean", sharded="gather") as gathered:
        model(input_ids=IDS, attention_mask=MASK)
    return {**acts, **gathered}


def test_parts_are_gathered_or_refused_and_whole_values_need_nothing(ranks, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad(), capture(model, named(CUT + WHOLE), reduce="mean") as acts:
        model(input_ids=IDS, attention_mask=MASK)
    for values in ranks(tensor_parallel, str(tmp_path), 29_600 + os.getpid() % 300):
        assert sorted(values) == sorted(acts)
        for layer, value in values.items():
            torch.testing.assert_close(value, acts[layer], msg=layer)
