"""Combined layers in stores and sinks."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_bert, tiny_tokenizer

from activation_extractor import MemorySink, blocks, capture, combined, extract, open_store
from activation_extractor.errors import OtherRunError

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TOKENS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])


@pytest.mark.parametrize("how", ["mean", "concat"])
def test_a_data_set_is_stored_resumed_and_compared(stack, tmp_path, how):
    batches = [{"input_ids": TOKENS, "attention_mask": LEFT}, {"input_ids": TOKENS.flip(0), "attention_mask": LEFT}]
    options = {"reduce": ["full", "max", "mean"], "out": tmp_path / "out", "rows_per_unit": 2, "progress": False}
    layers = {"some": combined(blocks(stack), how)}
    store = extract(stack, batches, [layers, "h.1"], **options)
    assert store.names == ["h.1", "some"]
    with torch.no_grad(), capture(stack, blocks(stack)) as plain:
        stack(TOKENS, LEFT)
    each = [plain[name] for name in blocks(stack)]
    whole = torch.stack(each).mean(0) if how == "mean" else torch.cat(each, -1)
    assert [len(row) for row in store["some", "full"]] == [3, 5, 3, 5]
    assert torch.allclose(store["some", "full"][0], whole[0, 2:])
    assert torch.allclose(store["some", "max"][0], whole[0, 2:].amax(0))
    assert torch.allclose(store["some", "mean"][1], whole[1].mean(0), atol=1e-6)
    extract(stack, batches, [layers, "h.1"], **options)
    for other in (combined(blocks(stack), "mean" if how == "concat" else "concat"), combined(["h.0", "h.1"], how)):
        with pytest.raises(OtherRunError, match="layers|reducers"):
            extract(stack, batches, [{"some": other}, "h.1"], **options)


def test_each_step_of_a_sink_has_its_own(stack):
    sink = MemorySink()
    with capture(stack, {"some": combined("h.*", "mean")}, sink=sink, reduce=["full", "max"]) as acts:
        stack(TOKENS, LEFT)
        first = acts["some", "max"]
        stack(TOKENS.flip(0), LEFT)
        with acts.step():
            stack(TOKENS, LEFT)
    assert torch.equal(sink["some", "max"][:2], first)
    assert torch.equal(sink["some", "max"][4:], first)
    assert len(sink.steps) == 3
    assert torch.equal(acts["some", "max"], first)


def test_a_store_of_a_block_has_the_column_alone(stack, tmp_path):
    with capture(stack, {"x": combined("h.*", "concat")}, reduce="last", sink=tmp_path / "out"):
        stack(TOKENS, LEFT)
    assert open_store(tmp_path / "out").names == ["x"]
    assert open_store(tmp_path / "out")["x"].shape == (2, 32)


def test_the_last_layers_of_a_transformer_are_its_hidden_states(tmp_path):
    bert, batch = tiny_bert(), tiny_tokenizer()(["ACDE", "AC"], padding=True, return_tensors="pt")
    layers = {how: combined("encoder.layer.[1-2]", how) for how in ("mean", "concat")}
    store = extract(bert, [dict(batch)], layers, out=tmp_path / "out", reduce=["mean", "last"], progress=False)
    with torch.no_grad():
        hidden = bert(**batch, output_hidden_states=True).hidden_states[-2:]
    real = batch["attention_mask"][:, :, None]
    for how, whole in (("mean", torch.stack(hidden).mean(0)), ("concat", torch.cat(hidden, -1))):
        assert torch.allclose(store[how, "mean"].torch(), (whole * real).sum(1) / real.sum(1), atol=1e-5)
        assert torch.allclose(store[how, "last"].torch(), whole[range(2), [5, 3]], atol=1e-5)
