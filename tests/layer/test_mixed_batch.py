"""`adapter_names=`: each row of a batch gets the output of its own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, logits
from support.single_layers import adapt, add_adapter, linear_4bit, linear_8bit, linear_dense

from peft_sgrq import SGRQConfig

NAMES = ["b", "__base__", "default", "b", "query"]
kinds = pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 256, (len(NAMES), 9))


def three_adapters(base: Base, directory: Any, **config: Any) -> PeftModel:
    """Adapters `default`, active, `b`, and `query`, which has only the query layers."""
    model = adapted(base, directory, **config)
    model.add_adapter("b", SGRQConfig(ratio=0.9, init_weights=False))
    model.add_adapter("query", SGRQConfig(target_modules=["q_proj"], init_weights=False))
    return model.eval()


def alone(model: PeftModel, name: str, call: Any) -> Any:
    """What `call(model)` gives with one adapter for all rows, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    result = call(model)
    model.set_adapter("default")
    return result


@kinds
def test_each_row_gets_the_output_of_its_adapter(base, llama_dir, ids):
    model = three_adapters(base, llama_dir)
    mixed = logits(model, ids, adapter_names=NAMES)
    for name in set(NAMES):
        rows = [row for row, other in enumerate(NAMES) if other == name]
        expected = alone(model, name, lambda model, rows=rows: logits(model, ids[rows]))
        others = alone(
            model, "default" if name != "default" else "b", lambda model, rows=rows: logits(model, ids[rows])
        )
        # The layers see the same rows, attention and norms a larger batch: equal but for the order of their sums.
        torch.testing.assert_close(mixed[rows], expected, rtol=1e-5, atol=1e-4)
        assert (mixed[rows] - others).abs().max() > 0.05
    model.set_adapter("query")
    assert torch.equal(logits(model, ids, adapter_names=NAMES), mixed), "the active adapter must not matter"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([linear_4bit, linear_8bit, linear_dense]),
    st.lists(st.sampled_from(["default", "b", "__base__"]), max_size=7),
)
def test_the_rows_of_a_layer_have_the_bits_of_their_adapter(make, names):
    torch.manual_seed(0)
    model = adapt(make(8, 192), [0, 1])
    add_adapter(model, "b", [1])
    model.eval()
    x = torch.randn(len(names), 3, 192)
    mixed = model(x, adapter_names=names)
    assert mixed.shape == (len(names), 3, 8)
    for name in set(names):
        rows = [row for row, other in enumerate(names) if other == name]
        assert torch.equal(mixed[rows], alone(model, name, lambda model, rows=rows: model(x[rows])))


@kinds
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_serves_each_row_its_adapter(base, llama_dir, ids, beams):
    model = three_adapters(base, llama_dir)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda model, row=row: model.generate(input_ids=ids[row : row + 1], **settings))
        assert torch.equal(mixed[row : row + 1], expected), name


def test_rows_get_the_trained_modules_of_their_adapter(llama_dir, ids):
    model = three_adapters(NF4, llama_dir, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.neg_()
    expected = logits(model, ids)
    mixed = logits(model, ids, adapter_names=["default"] * len(ids))
    torch.testing.assert_close(mixed, expected)
    base = alone(model, "__base__", lambda model: logits(model, ids))
    mixed = logits(model, ids, adapter_names=["__base__"] * len(ids))
    torch.testing.assert_close(mixed, base)


@kinds
def test_all_rows_of_the_base_are_the_base(base, llama_dir, ids):
    model = three_adapters(base, llama_dir)
    expected = logits(base.load(llama_dir), ids)
    assert torch.equal(logits(model, ids, adapter_names=["__base__"] * len(ids)), expected)


def test_a_disabled_adapter_disables_it_for_all_rows(llama_dir, ids):
    model = three_adapters(NF4, llama_dir)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, adapter_names=NAMES), logits(NF4.load(llama_dir), ids))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["default"], ValueError, r"Length of `adapter_names`.*1 and 5"),
        ([*NAMES, "b"], ValueError, r"Length of `adapter_names`.*6 and 5"),
        (["default", "no", "b", "b", "such"], ValueError, r"non-existing adapter\(s\): no, such; .*'default'"),
        ("default", TypeError, r"is a str, expected a list"),
    ],
)
def test_wrong_names_are_refused(llama_dir, ids, names, error, message):
    model = three_adapters(NF4, llama_dir)
    expected = logits(model, ids)
    with pytest.raises(error, match=message):
        logits(model, ids, adapter_names=names)
    assert torch.equal(logits(model, ids), expected), "nothing of the refused call may remain"


def test_training_mode_is_refused(llama_dir, ids):
    model = three_adapters(NF4, llama_dir).train()
    with pytest.raises(ValueError, match=r"training mode; call `model.eval\(\)`"):
        model(input_ids=ids, adapter_names=NAMES)


def test_merged_adapters_are_refused(llama_dir, ids):
    model = three_adapters(NF4, llama_dir)
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"merged adapters.*`unmerge_adapter`.*\['b'\]"):
        logits(model, ids, adapter_names=NAMES)
    model.unmerge_adapter()
    logits(model, ids, adapter_names=NAMES)


def test_a_batch_of_names_leaves_no_hooks(llama_dir, ids):
    model = three_adapters(NF4, llama_dir)
    before = [list(module._forward_pre_hooks) for module in model.modules()]
    logits(model, ids, adapter_names=NAMES)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == before
