"""Ratios by layer: the choice keeps to the budget and selects what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4
from support.ratio_inputs import GROUP, QUICK, saliency_of, text

from peft_sgrq import SGRQConfig, allocate_ratios, calibrate
from peft_sgrq.selection.layerwise.allocate_ratios import LayerRatios, split_blocks
from peft_sgrq.selection.ratio import count_selected
from peft_sgrq.selection.saliency import Saliency

pytestmark = pytest.mark.slow


@pytest.fixture
def dense(llama_dir) -> tuple[Any, SGRQConfig]:
    return DENSE.load(llama_dir), SGRQConfig(group_size=GROUP)


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"budget": 0.4, "ratios": (0.1, "knee")}, text(), TypeError, "'knee'.*, expected some numbers"),
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
