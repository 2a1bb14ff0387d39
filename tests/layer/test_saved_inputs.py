"""What layers save of their input for their backward passes, and share with others that have the same."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support.bases import DENSE, NF4, NF4_NESTED, adapted
from support.oracle import relative_error
from support.single_layers import adapt, delta_of, kept_tensors, linear_4bit, linear_8bit, linear_dense, storage_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.masks import encode_mask

quick = settings(max_examples=60, deadline=None, derandomize=True)
TOKENS = 10


class Siblings(nn.Module):
    """Some layers with the same input; their outputs are added up."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) * (index + 1) for index, layer in enumerate(self.layers))


def siblings(make: Any, columns: int, selections: list[list[int]]) -> Any:
    torch.manual_seed(0)
    groups = -(-columns // 64)
    config = SGRQConfig(
        target_modules=r"layers\.\d+",
        init_weights=False,
        selection={
            f"layers.{index}": encode_mask(torch.tensor(chosen), groups) for index, chosen in enumerate(selections)
        },
    )
    return get_peft_model(Siblings([make(8, columns) for _ in selections]), config).train()


def is_input(tensor: torch.Tensor, tokens: int = TOKENS) -> bool:
    return tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[0] == tokens


def saved_input_bytes(model: Any, x: torch.Tensor) -> int:
    return storage_bytes([tensor for tensor in kept_tensors(model(x)) if is_input(tensor)])


def gradients(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    (model(x) * torch.linspace(-1, 1, 8)).sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@quick
@given(st.data())
def test_layers_save_their_own_columns_and_those_that_train_all_save_the_input_once(data):
    columns = data.draw(st.sampled_from([256, 230]))
    make = linear_dense if columns == 230 else data.draw(st.sampled_from([linear_4bit, linear_dense]))
    selections = data.draw(
        st.lists(st.sets(st.integers(0, 3), min_size=1).map(sorted), min_size=1, max_size=4), label="selections"
    )
    model = siblings(make, columns, selections)
    width = sum(64 * len(chosen) for chosen in selections if len(chosen) < 4)  # a partial group is padded
    if [0, 1, 2, 3] in selections:
        width += columns
    assert saved_input_bytes(model, torch.randn(TOKENS, columns)) == TOKENS * width * 4


@pytest.mark.slow
@quick
@given(st.data())
def test_gradients_do_not_depend_on_what_siblings_saved_before(data):
    columns = data.draw(st.sampled_from([256, 230]))
    make = linear_dense if columns == 230 else data.draw(st.sampled_from([linear_4bit, linear_dense]))
    selections = data.draw(
        st.lists(st.sets(st.integers(0, 3), min_size=1).map(sorted), min_size=2, max_size=4), label="selections"
    )
    model = siblings(make, columns, selections)
    x = torch.randn(TOKENS, columns)
    found = gradients(model, x)
    for index, layer in enumerate(model.base_model.model.layers):
        alone = x.clone().requires_grad_()
        model.zero_grad()
        (layer(alone) * (index + 1) * torch.linspace(-1, 1, 8)).sum().backward()
        expected = layer.sgrq_delta["default"].weight.grad
        assert relative_error(found[1 + index], expected.double()) < 1e-5


def test_an_input_changed_in_place_between_siblings_is_saved_again():
    model = siblings(linear_4bit, 256, [[0, 1], [0, 1]])
    first, second = model.base_model.model.layers
    x = torch.randn(TOKENS, 256)
    y = first(x).sum()
    changed = x.clone()
    x.mul_(3)
    (y + second(x).sum()).backward()
    found = [layer.sgrq_delta["default"].weight.grad.clone() for layer in (first, second)]
    model.zero_grad()
    (first(changed).sum() + second(x.clone()).sum()).backward()
    for gradient, layer in zip(found, (first, second), strict=True):
        assert torch.equal(gradient, layer.sgrq_delta["default"].weight.grad)


def test_a_compute_dtype_of_its_own_is_saved_in_that_dtype_once():
    model = siblings(linear_4bit, 256, [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3]])
    for layer in model.base_model.model.layers:
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = torch.bfloat16, True
    assert saved_input_bytes(model, torch.randn(TOKENS, 256)) == TOKENS * (256 + 128) * 2


def test_nothing_is_kept_once_the_graph_is_gone():
    model = siblings(linear_4bit, 256, [[0, 1], [1, 2], [0, 1, 2, 3]])
    x = torch.randn(TOKENS, 256)
    y = model(x)
    kept = [weakref.ref(tensor) for tensor in kept_tensors(y) if is_input(tensor)]
    assert kept and all(reference() is not None for reference in kept)
    del y
    assert all(reference() is None for reference in kept)


def test_a_deleted_model_leaves_no_tensors_behind():
    model = siblings(linear_4bit, 256, [[0, 1], [1, 2], [0, 1, 2, 3], [0, 1, 2, 3]])
    for layer in model.base_model.model.layers:
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = torch.bfloat16, True
    model(torch.randn(TOKENS, 256)).sum().backward()
    left = [weakref.ref(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    del model, layer
    gc.collect()
    assert not any(reference() is not None for reference in left)


def test_under_hooks_on_saved_tensors_each_layer_saves_its_own():
    model = siblings(linear_4bit, 256, [[0, 1], [0, 1], [0]])
    x, widths = torch.randn(TOKENS, 256), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if is_input(tensor):
            widths.append(tensor.shape[1])
        return tensor

    for _ in range(2):  # whatever is left of a first pass
        widths.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        assert widths == [128, 128, 64]
        model(x)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointed_layers_give_the_gradients_of_plain_ones(reentrant):
    model = siblings(linear_4bit, 256, [[0, 1], [1, 2], [0, 3]])
    x = torch.randn(TOKENS, 256)
    expected = gradients(model, x)
    whole = model.forward
    model.forward = partial(checkpoint, whole, use_reentrant=reentrant)
    try:
        found = gradients(model, x)
    finally:
        del model.forward
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_layers_of_a_model_save_no_more_than_their_inputs(llama_dir, ids, base, ratio):
    model = adapted(base, llama_dir, random=False, ratio=ratio).train()
    kept = kept_tensors(model(input_ids=ids, use_cache=False).logits)
    total = storage_bytes([tensor for tensor in kept if is_input(tensor, ids.numel())])
    # In each of the 2 blocks three layers share one input of 64 columns, two another, and o and down have their own.
    whole = 2 * (64 + 64 + 64 + 128) * ids.numel() * 4
    assert total == whole if ratio == 1.0 else total <= whole


def test_inputs_can_be_saved_and_copied_after_a_forward_pass(tmp_path):
    model = siblings(linear_4bit, 256, [[0, 1], [1, 2]])
    first, second = model.base_model.model.layers
    x = torch.randn(TOKENS, 256)
    kept = first(x)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt"), x)
    changed = copy.deepcopy(x).mul_(3)
    second(changed).sum().backward()
    found = second.sgrq_delta["default"].weight.grad.clone()
    model.zero_grad()
    del kept
    second(x * 3).sum().backward()
    assert torch.equal(found, second.sgrq_delta["default"].weight.grad)


def test_layers_that_round_their_input_each_save_their_own(monkeypatch):
    model = siblings(linear_4bit, 256, [[0, 1], [0, 1]])
    second = model.base_model.model.layers[1]
    monkeypatch.setattr(second.scaled_weight, "computed_input", lambda x: x.round())
    x = torch.randn(TOKENS, 256)
    first, other = (tensor for tensor in kept_tensors(model(x)) if is_input(tensor))
    expected = x[:, :128], x[:, :128].round()
    assert any(torch.equal(first, a) and torch.equal(other, b) for a, b in (expected, expected[::-1]))


# how much is kept


def saved_bytes(model: Any, x: torch.Tensor) -> int:
    """Bytes of the distinct tensors that autograd saves in one forward call."""
    storages: dict[int, torch.Tensor] = {}  # kept alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("needs_dx", [False, True], ids=["first-layer", "inner-layer"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "dense"])
def test_only_the_selected_columns_are_kept_for_the_backward_pass(kind, needs_dx):
    layer = linear_dense(64, 1024) if kind == "dense" else linear_4bit(64, 1024, nested=kind.endswith("nested"))
    model = adapt(layer, [3, 8])
    x = torch.randn(50, 1024, requires_grad=needs_dx)
    columns = 50 * 2 * 64 * 4
    adapter = delta_of(model).numel() * 4 + 2 * 8  # and the int64 indices
    assert saved_bytes(model, x) == columns + adapter


def test_row_formats_keep_the_selected_outputs_and_no_input():
    model = adapt(linear_8bit(8, 1024, bias=False), [1, 5])
    x = torch.randn(50, 1024, requires_grad=True)
    assert saved_bytes(model, x) == 50 * 2 * 4 + 2 * 4 + 2 * 8
