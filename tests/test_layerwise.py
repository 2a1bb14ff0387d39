"""Ratios by layer: the terms are those of an adapter, the choice keeps to the budget, the model stays as it was."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from bases import DENSE, INT8, NF4, Base
from peft import get_peft_model

from peft_sgrq import SGRQConfig, allocate_ratios, calibrate
from peft_sgrq.selection.data import Batch
from peft_sgrq.selection.interactions import STEP_LENGTHS, Options, directions, estimate, halves, measure
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.layerwise import LayerRatios, split_blocks
from peft_sgrq.selection.probe import count_labels, probing, split_rows, stack_rows
from peft_sgrq.selection.ratio import count_selected
from peft_sgrq.selection.saliency import Saliency
from peft_sgrq.targets import find_targets, supported_layers

GROUP = 16
QUICK: dict[str, Any] = {"ratios": (0.1, 0.5), "progress": False}


def backends_of(model: Any, config: SGRQConfig) -> dict[str, Any]:
    names = supported_layers(model, config)
    return find_targets(model, config, lambda _, name: name in names)


def saliency_of(model: Any, config: SGRQConfig) -> Saliency:
    """By magnitude."""
    layers = {}
    for name, backend in backends_of(model, config).items():
        squares = backend.dequantize(backend.scales(), torch.float32).square()
        layers[name] = LayerSaliency.of(backend, squares.sum(1 if backend.granularity == "row" else 0))
    return Saliency(layers, "magnitude")


def everything(backends: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.arange(backend.selectable) for name, backend in backends.items()}


def text(rows: int = 6, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 256, (2, length), generator=generator)} for _ in range(rows // 2)]


def rows_of(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return split_rows([Batch.of(batch) for batch in data])


def state_of(model: Any) -> dict[str, Any]:
    tensors = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    modules = [
        (name, type(module), module.training, sorted(module.__dict__)) for name, module in model.named_modules()
    ]
    hooks = [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]
    parameters = [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return {
        "tensors": tensors,
        "modules": modules,
        "forward": [module.forward for module in model.modules()],
        "hooks": hooks,
        "parameters": parameters,
        "random": torch.get_rng_state(),
        "use_cache": model.config.use_cache,
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key in ("modules", "forward", "hooks", "use_cache"):
        assert found[key] == expected[key], key
    assert found["tensors"].keys() == expected["tensors"].keys()
    for key, value in expected["tensors"].items():
        assert torch.equal(found["tensors"][key], value), key
    for (one, trainable, grad), (other, was_trainable, was_grad) in zip(
        found["parameters"], expected["parameters"], strict=True
    ):
        assert one == other and trainable == was_trainable
        assert (grad is None) == (was_grad is None) and (grad is None or torch.equal(grad, was_grad))
    assert torch.equal(found["random"], expected["random"])


@pytest.fixture
def dense(llama_dir) -> tuple[Any, SGRQConfig]:
    return DENSE.load(llama_dir), SGRQConfig(group_size=GROUP)


# the probe


@pytest.mark.parametrize("base", [NF4, INT8, DENSE, Base("nf4", True, torch.bfloat16)], ids=lambda base: base.name)
def test_without_deltas_the_probe_is_the_model_bit_for_bit(base, llama_dir, ids):
    model = base.load(llama_dir)
    expected = model(input_ids=ids, labels=ids).loss.float()
    backends = backends_of(model, SGRQConfig(group_size=GROUP))
    with probing(model, backends, everything(backends)) as probe:
        assert torch.equal(probe.loss({"input_ids": ids, "labels": ids}), expected)


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
def test_gradients_of_the_probe_are_those_of_an_adapter(base, llama_dir, ids):
    model = base.load(llama_dir)
    backends = backends_of(model, SGRQConfig(group_size=GROUP))
    groups = {name: torch.arange(0, backend.selectable, 2) for name, backend in backends.items()}
    with probing(model, backends, groups) as probe:
        found = probe.gradients({"input_ids": ids, "labels": ids})
    from peft_sgrq.selection import encode_mask

    masks = {name: encode_mask(groups[name], backend.selectable) for name, backend in backends.items()}
    adapted = get_peft_model(model, SGRQConfig(group_size=GROUP, selection=masks)).eval()
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in found.items():
        expected = adapted.get_submodule(f"base_model.model.{name}").sgrq_delta["default"].weight.grad
        assert float(expected.abs().max()) > 0
        assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("fails", [False, True], ids=["done", "interrupted"])
def test_the_model_stays_as_it_was(base, fails, llama_dir):
    model = base.load(llama_dir).train()
    model.model.norm.eval()
    model.model.norm.register_forward_hook(lambda *_: None)
    model.model.norm.weight.grad = torch.ones(64)
    config = SGRQConfig(group_size=GROUP)
    saliency = saliency_of(model, config)
    before = state_of(model)
    data: Any = text()
    if fails:
        data = [*text(), {"input_ids": torch.full((1, 8), 10**6)}]  # no such token: the embedding fails
    settings = copy.copy(config.__dict__)
    if fails:
        with pytest.raises(IndexError):
            allocate_ratios(model, config, data, saliency, budget=0.9, **QUICK)
    else:
        allocate_ratios(model, config, data, saliency, budget=0.9, **QUICK)
    assert_same_state(state_of(model), before)
    assert config.__dict__ == settings


# the terms


def options_for(backends: dict[str, Any], counts: tuple[int, ...]) -> dict[str, Options]:
    """Each layer may take its first groups."""
    return {
        name: Options(
            ranks=torch.arange(backend.selectable),
            dim=backend.selected_dim,
            counts=counts,
            costs=tuple(count * backend.out_features for count in counts),
        )
        for name, backend in backends.items()
    }


@pytest.fixture
def block(dense):
    """The layers of the first block, with options and rows."""
    model, config = dense
    backends = {name: backend for name, backend in backends_of(model, config).items() if ".layers.0." in name}
    rows = rows_of(text(8))
    return model, backends, options_for(backends, (1, 3)), [list(backends)], rows


def test_directions_are_the_first_step_of_adam_on_the_mean_gradient(block):
    model, backends, _, _, rows = block
    with probing(model, backends, everything(backends)) as probe:
        gradients = [probe.gradients(row) for row in rows]
        found = directions(probe, rows, lambda: None)
    for name in backends:
        stacked = torch.stack([gradient[name] for gradient in gradients]).double()
        expected = -stacked.mean(0) / stacked.square().mean(0).sqrt()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)
        assert float(found[name].abs().max()) <= 1 + 1e-5


def test_measured_terms_are_changes_of_the_loss(block):
    model, backends, options, blocks, rows = block
    names = blocks[0]
    with probing(model, backends, everything(backends)) as probe:
        steps = directions(probe, rows[:4], lambda: None)
        (found,) = measure(probe, steps, options, blocks, stack_rows(rows[4:], 8), lambda: None)
        # Every value is the loss of the model with one step length for all; find it from one of them.
        batch = stack_rows(rows[4:], 8)[0]

        def loss(eta: float, *chosen: tuple[str, int]) -> float:
            for name in names:
                probe.set(name, 0.0)
            for name, option in chosen:
                step = eta * steps[name]
                step[:, options[name].counts[option] :] = 0
                probe.set(name, step)
            return float(probe.loss(batch).detach().double())

        base = loss(0)
        full = {eta: _loss_of_all(probe, steps, eta, batch) for eta in STEP_LENGTHS}
        eta = min(full, key=lambda eta: full[eta])
        for i, j in ((0, 1), (2, 6)):
            for m, k in itertools.product(range(2), range(2)):
                one, other = loss(eta, (names[i], m)) - base, loss(eta, (names[j], k)) - base
                assert found.values[i][m] == pytest.approx(one, abs=1e-6)
                both = loss(eta, (names[i], m), (names[j], k)) - base
                assert found.pairs[i, j][m, k] == pytest.approx(both - one - other, abs=2e-6)
    assert min(values.min() for values in found.values) < -1e-4  # far more than the tolerance
    assert [list(costs) for costs in found.costs] == [list(options[name].costs) for name in names]


def _loss_of_all(probe: Any, steps: dict[str, torch.Tensor], eta: float, batch: dict[str, torch.Tensor]) -> float:
    for name, step in steps.items():
        probe.set(name, eta * step)
    return float(probe.loss(batch).detach())


def test_estimated_terms_are_those_of_the_fisher_information(block):
    model, backends, options, blocks, rows = block
    names = blocks[0]
    rows = [*rows[:3], {key: value[:, :7] for key, value in rows[3].items()}]  # of unequal length
    with probing(model, backends, everything(backends)) as probe:
        steps = directions(probe, rows_of(text(4, seed=1)), lambda: None)
        (found,) = estimate(probe, steps, options, blocks, rows, lambda: None)
        gradients = [probe.gradients(row) for row in rows]
    columns, last = [], []
    for name in names:
        for option, count in enumerate(options[name].counts):
            step = steps[name].double().clone()
            step[:, count:] = 0
            columns.append([float((gradient[name].double() * step).sum()) for gradient in gradients])
            if option == 1:
                last.append(columns[-1])
    slopes = np.array(columns).T  # (S, layers * options)
    tokens = np.array([count_labels(row) for row in rows], dtype=float)
    mean = tokens @ slopes / tokens.sum()
    centred = tokens[:, None] * (slopes - mean)
    fisher = np.outer(mean, mean) + centred.T @ centred / tokens.sum()
    every = np.kron(np.ones(len(names)), [0.0, 1.0])  # all layers at their largest option
    eta = -(every @ mean) / (every @ fisher @ every)
    assert 0 < eta < 1
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        expected = eta * mean[part] + eta**2 / 2 * np.diag(fisher)[part]
        np.testing.assert_allclose(found.values[i], expected, rtol=1e-4, atol=1e-9, err_msg=name)
    for i, j in itertools.combinations(range(len(names)), 2):
        expected = eta**2 * fisher[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(found.pairs[i, j], expected, rtol=1e-4, atol=1e-9)


def test_directions_and_what_they_gain_come_from_different_rows():
    rows = rows_of(text(5))
    first, second = halves(rows)
    assert len(first) + len(second) == len(rows)
    assert not {id(row) for row in first} & {id(row) for row in second}
    assert halves(rows[:1]) == (rows[:1], rows[:1])


# the choice


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("method", ["fisher", "measured"])
def test_ratios_keep_to_the_budget_and_select_what_they_say(base, method, llama_dir):
    model = base.load(llama_dir)
    config = SGRQConfig(group_size=GROUP, layers_to_transform=[0])
    saliency = saliency_of(model, config)
    found = allocate_ratios(model, config, text(), saliency, budget=0.9, method=method, **QUICK)
    assert isinstance(found, LayerRatios) and set(found.ratios) == set(saliency.layers)
    assert set(found.ratios.values()) <= {0.1, 0.5}
    scales = sum(
        layer.scales_per_group * count_selected(found.ratios[name], layer.selectable)
        for name, layer in saliency.layers.items()
    )
    assert scales == found.scales <= found.budget
    adapted = get_peft_model(model, saliency.configure(config, ratio=found.ratios))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == scales


def test_calibration_finds_the_ratios_where_the_config_says_so(dense, tmp_path):
    model, _ = dense
    config = SGRQConfig(ratio="layerwise", budget=0.4, group_size=GROUP)
    saliency = calibrate(model, config, text(8), progress=False)
    saliency.save(tmp_path / "saliency.safetensors")
    again = Saliency.load(tmp_path / "saliency.safetensors").configure(SGRQConfig(ratio="layerwise", group_size=GROUP))
    assert again.selection == config.selection
    assert len(set(saliency.ratios.values())) > 1
    adapted = get_peft_model(model, config)
    total = sum(layer.selectable * layer.scales_per_group for layer in saliency.layers.values())
    assert 0 < sum(p.numel() for p in adapted.parameters() if p.requires_grad) <= 0.4 * total


def test_layers_that_do_nothing_get_the_smallest_ratio(dense):
    model, config = dense
    dead = model.model.layers[1]
    dead.mlp.down_proj.weight.data.zero_()  # so gate_proj and up_proj before it change nothing
    saliency = saliency_of(model, config)
    for method in ("fisher", "measured"):
        found = allocate_ratios(model, config, text(), saliency, budget=0.35, method=method, **QUICK)
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert found.ratios[f"model.layers.1.mlp.{name}"] == 0.1
        assert 0.5 in found.ratios.values()


def test_a_larger_budget_is_expected_to_gain_no_less(dense):
    model, config = dense
    saliency = saliency_of(model, config)
    gains = [
        allocate_ratios(model, config, text(), saliency, budget=budget, **QUICK).expected for budget in (0.3, 0.4, 1.0)
    ]
    assert gains[0] >= gains[1] >= gains[2] and gains[0] > gains[2]


def test_padding_does_not_count(dense):
    model, config = dense
    saliency = saliency_of(model, config)
    plain = text(4)
    padded = []
    for batch in plain:
        pad = torch.full((2, 5), 2)
        padded.append(
            {
                "input_ids": torch.cat([batch["input_ids"], pad], 1),
                "attention_mask": torch.cat([torch.ones_like(batch["input_ids"]), torch.zeros_like(pad)], 1),
            }
        )
    padded.append({"input_ids": torch.full((2, 5), 2), "attention_mask": torch.zeros(2, 5, dtype=torch.int64)})
    one, other = (allocate_ratios(model, config, data, saliency, budget=0.4, **QUICK) for data in (plain, padded))
    assert one.ratios == other.ratios and one.expected == other.expected


def _run_process(rank: int, directory: str, data: list[Any], method: str, found: Any, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(data))
    model, config = DENSE.load(directory), SGRQConfig(group_size=GROUP, layers_to_transform=[0])
    saliency = saliency_of(model, config)
    found.put(allocate_ratios(model, config, data[rank], saliency, budget=0.4, method=method, **QUICK))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["fisher", "measured"])
def test_two_processes_find_what_one_does_on_all_the_data(method, llama_dir, tmp_path):
    rows = [batch["input_ids"] for batch in text(8)]
    context = torch.multiprocessing.get_context("fork")
    found = context.Queue()
    parts = [[{"input_ids": part} for part in rows[:2]], [{"input_ids": part} for part in rows[2:]]]
    arguments = (str(llama_dir), parts, method, found, str(tmp_path / "store"))
    processes = [context.Process(target=_run_process, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    one, other = (found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    model, config = DENSE.load(llama_dir), SGRQConfig(group_size=GROUP, layers_to_transform=[0])
    alone = allocate_ratios(
        model, config, parts[0] + parts[1], saliency_of(model, config), budget=0.4, method=method, **QUICK
    )
    assert one.ratios == other.ratios == alone.ratios and one.expected == other.expected
    assert one.expected == pytest.approx(alone.expected, rel=1e-3)


def test_ratio_pattern_overrules_and_counts_in_the_budget(dense):
    model, config = dense
    config.ratio_pattern = {"o_proj": 1.0, "layers.0.mlp.down_proj": "knee"}
    saliency = saliency_of(model, config)
    found = allocate_ratios(model, config, text(), saliency, budget=0.5, **QUICK)
    counts = saliency.counts(1.0, config.ratio_pattern)
    for name, layer in saliency.layers.items():
        if name.endswith(("o_proj", "layers.0.mlp.down_proj")):
            assert count_selected(found.ratios[name], layer.selectable) == counts[name]
        else:
            assert found.ratios[name] in (0.1, 0.5)


def test_budgets_are_shares_numbers_or_sizes(dense):
    model, config = dense
    saliency = saliency_of(model, config)
    total = sum(layer.selectable * layer.scales_per_group for layer in saliency.layers.values())
    budgets = [
        allocate_ratios(model, config, text(2), saliency, budget=budget, **QUICK).budget
        for budget in (0.5, total // 2, "9KB", None)
    ]
    assert budgets == [total // 2, total // 2, 9000 // 4, int(total * 0.4 + 1e-9)]


def test_blocks_are_split_by_name_and_large_ones_by_parent():
    layers = [f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert split_blocks(dict.fromkeys([*layers, "lm_head"], 5)) == [layers[:2], layers[2:4], layers[4:], ["lm_head"]]
    experts = [f"layers.0.mlp.experts.{e}.{name}" for e in range(8) for name in ("gate", "up", "down")]
    attention = ["layers.0.attn.q", "layers.0.attn.k"]
    parts = split_blocks(dict.fromkeys([*attention, *experts], 5))
    assert parts == [attention, *(experts[3 * e : 3 * e + 3] for e in range(8))]
    wide = [f"layers.0.mlp.linear{i}" for i in range(20)]
    assert split_blocks(dict.fromkeys(wide, 5)) == [[name] for name in wide]


@pytest.mark.parametrize(
    ("arguments", "data", "error", "message"),
    [
        ({"budget": 0.01}, text(), ValueError, r"allows \d+ scales, but the smallest ratio \(0.1\) takes \d+"),
        ({"budget": 0.4, "method": "exact"}, text(), ValueError, "'exact', expected one of"),
        ({"budget": 0.4, "ratios": (0.1, 2.0)}, text(), ValueError, "in \\(0, 1\\]"),
        ({"budget": 0.4, "ratios": (0.1, "knee")}, text(), TypeError, "'knee', expected numbers"),
        ({"budget": 0.4, "ratios": ()}, text(), TypeError, "expected some numbers"),
        ({"budget": 0.4}, [], ValueError, "is empty"),
        ({"budget": 0.4}, [{"input_ids": torch.zeros(2, 1, dtype=torch.int64)}], ValueError, "at least two tokens"),
        ({"budget": 0.4}, ["some text"], TypeError, "tokenizer"),
    ],
    ids=["budget", "method", "ratio", "named-ratio", "no-ratios", "no-data", "one-token", "no-batch"],
)
def test_mistakes_are_explained(arguments, data, error, message, dense):
    model, config = dense
    with pytest.raises(error, match=message):
        allocate_ratios(model, config, data, saliency_of(model, config), **{**QUICK, **arguments})


def test_a_model_with_an_adapter_or_another_model_is_refused(dense, llama_dir):
    model, config = dense
    saliency = saliency_of(model, config)
    with pytest.raises(ValueError, match="has an adapter"):
        allocate_ratios(get_peft_model(model, config), config, text(), saliency, budget=0.4, **QUICK)
    with pytest.raises(ValueError, match="another model"):
        allocate_ratios(NF4.load(llama_dir), config, text(), saliency, budget=0.4, **QUICK)
