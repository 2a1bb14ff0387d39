"""Bits by layer: costs are those of files, values those of the loss, the choice the best there is, and exact."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.bases import logits, train_steps
from support.rotated_models import assert_same, random_model, state
from transformers import AutoModelForCausalLM

from peft_sgrq import BitPlan, Rotations, SGRQConfig, allocate_bits, quantize
from peft_sgrq.choices import size_in_bytes
from peft_sgrq.passes.data import load_batches
from peft_sgrq.rotation.bit_values import Rounding, by_fisher, by_measured_loss, by_output
from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.scheme import Scheme
from peft_sgrq.selection.layerwise.probe import mean_loss, split_rows

pytestmark = pytest.mark.slow

pytest.importorskip("compressed_tensors")


@pytest.fixture
def rows(ids):
    return split_rows(load_batches([ids % 256]))


def bits16(kind="llama with biases", **config):
    return random_model(kind, torch.bfloat16, **config)


@pytest.mark.slow
def test_the_size_is_that_of_the_saved_tensors_and_the_budget_is_kept(tmp_path, ids):
    for at, bits in enumerate((2.6, 3.1, 3.9, "0.05MB")):
        model = bits16()
        plan = allocate_bits(model, [ids % 256], bits=bits, group_size=32, progress=False)
        assert plan.size <= plan.budget
        quantize(model, plan).save_pretrained(tmp_path / str(at))
        tensors = load_file(tmp_path / str(at) / "model.safetensors")
        stored = [tensor.nbytes for name, tensor in tensors.items() if ".weight_" in name]
        assert sum(stored) == plan.size
        assert len(set(plan.layers.values())) > 1 or plan.uniform


@pytest.mark.parametrize("inner", [96, 172, 180])
def test_the_bits_of_a_plan_are_a_budget_it_keeps(inner, ids):
    for width in (2, 3, 4, 6, 8):
        model = bits16(intermediate_size=inner)
        settings = {"widths": (width,), "group_size": 32, "progress": False}
        plan = allocate_bits(model, [ids % 256], bits=20, **settings)
        assert allocate_bits(model, [ids % 256], bits=plan.bits, **settings).layers == plan.layers


def test_one_width_is_the_scheme_of_that_name_bit_for_bit(ids):
    planned, named = bits16(), bits16()
    quantize(planned, allocate_bits(planned, [ids % 256], bits=4.5, widths=(4,), group_size=32, progress=False))
    quantize(named, "W4A16", group_size=32)
    assert_same(planned, state(named))


def test_fisher_values_are_the_slopes_of_the_loss(rows):
    model = random_model("llama, tied", torch.float64, num_hidden_layers=1)
    layers = quantizable_layers(model)
    name = "model.layers.0.mlp.up_proj"
    rounding = Rounding(layers, [2, 4], Scheme(4))
    layers[name].weight.grad = kept = torch.ones_like(layers[name].weight)
    before = state(model)
    found = by_fisher(model, rounding, [[name]], rows, lambda: None)[0]
    assert_same(model, before)
    assert layers[name].weight.grad is kept
    own = layers[name].weight.data
    for index, width in enumerate((2, 4)):
        step = 1e-2 * (rounding.weight(name, width) - own)
        slopes = []
        for row in rows:
            losses = []
            for sign in (1, -1):
                layers[name].weight.data = own + sign * step
                losses.append(mean_loss(model, [row]))
            slopes.append((losses[0] - losses[1]) / 2e-2)
        layers[name].weight.data = own
        labels = rows[0]["labels"].numel()
        expected = np.mean(slopes) + (np.mean(slopes) ** 2 + labels * np.var(slopes)) / 2
        assert found[index] == pytest.approx(expected, rel=1e-2)


def test_layers_of_one_weight_share_its_slope(rows):
    model = random_model("llama, tied", torch.float64)
    one, other = (layer.mlp.up_proj for layer in model.model.layers)
    other.weight = one.weight
    before = state(model)
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    rounding = Rounding(quantizable_layers(model), [2, 4], Scheme(4))
    first, second, both = by_fisher(model, rounding, [names[:1], names[1:], names], rows, lambda: None)
    assert_same(model, before)
    np.testing.assert_array_equal(first, second)
    alone = Rounding({names[0]: one}, [2, 4], Scheme(4))  # both layers are rounded with it
    np.testing.assert_allclose(by_fisher(model, alone, [names[:1]], rows, lambda: None)[0], both, rtol=1e-9)


def test_measured_values_are_differences_of_losses_and_pairs_complete_them(rows):
    model = random_model("llama, tied", num_hidden_layers=1)
    rounding = Rounding(quantizable_layers(model), [2, 3], Scheme(3))
    units = [["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"], ["model.layers.0.mlp.down_proj"]]
    alone, together = by_measured_loss(model, rounding, units, [[0, 1]], True, rows, lambda: None)
    base = mean_loss(model, rows)
    with rounding.applied({**dict.fromkeys(units[0], 2), units[1][0]: 3}):
        both = mean_loss(model, rows)
    assert alone[0][0] + alone[1][1] + together[0, 1][0, 1] == pytest.approx(both - base, abs=1e-6)


@pytest.mark.parametrize("criterion", ["fisher", "measured", "output"])
def test_the_plan_is_the_best_of_all_and_leaves_the_model_as_it_was(criterion, ids):
    model = bits16("llama, tied", num_hidden_layers=1)
    before = state(model)
    plan = allocate_bits(model, [ids % 256], bits=3.2, group_size=32, criterion=criterion, progress=False)
    assert_same(model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    units = [names.split(",") for names in plan.predicted]
    assert [len(unit) for unit in units] == [3, 1, 2, 1]
    for unit in units:
        assert len({plan.layers[name] for name in unit}) == 1
    if plan.uniform:
        assert plan.held_out["planned"] >= plan.held_out["uniform"]
    layers = quantizable_layers(model)
    rounding = Rounding(layers, [2, 3, 4], Scheme(4, group_size=32))
    halved = split_rows(load_batches([ids % 256]))[0::2]
    if criterion == "fisher":
        values = by_fisher(model, rounding, units, halved, lambda: None)
    elif criterion == "output":
        values = by_output(model, rounding, units, halved, lambda: None)
    else:
        values, _ = by_measured_loss(model, rounding, units, [], False, halved, lambda: None)
    values = [np.minimum.accumulate(value) for value in values]
    weights = [sum(layers[name].weight.numel() for name in unit) for unit in units]
    rest = {
        tuple(w): sum(value[i - 2] for value, i in zip(values, w, strict=True))
        for w in itertools.product((2, 3, 4), repeat=4)
        if sum(n * (i + 16 / 32) for n, i in zip(weights, w, strict=True)) + 7 * 128 <= 3.2 * sum(weights)
    }
    assert sum(plan.predicted.values()) == pytest.approx(min(rest.values()), abs=1e-9)


def test_without_fusing_layers_stand_alone(ids):
    model = bits16("llama, tied", num_hidden_layers=1)
    plan = allocate_bits(model, [ids % 256], bits=3.2, group_size=32, fuse=False, progress=False)
    assert len(plan.predicted) == len(plan.layers) == 7


@pytest.mark.slow
def test_what_is_returned_is_never_worse_than_uniform_on_data_held_out(ids):
    for seed in range(3):
        torch.manual_seed(seed)
        model = bits16("mistral")
        data = [torch.randint(3, 250, (8, 12))]
        plan = allocate_bits(model, data, bits=3.05, group_size=64, criterion="output", progress=False)
        best = min(plan.held_out["planned"], plan.held_out["uniform"])
        rounding = Rounding(quantizable_layers(model), sorted(set(plan.layers.values())), Scheme(4, group_size=64))
        with rounding.applied(plan.layers), torch.no_grad():
            assert mean_loss(model, split_rows(load_batches(data))[1::2]) == best
        assert plan.uniform == (plan.held_out["planned"] >= plan.held_out["uniform"])


@pytest.mark.slow
def test_a_planned_checkpoint_is_trained_and_merged_exactly(tmp_path, ids):
    model = random_model("llama with biases")
    plan = allocate_bits(model, [ids % 256], bits=4.0, group_size=32, progress=False)
    plan.layers.update({name: 2 + at % 3 for at, name in enumerate(plan.layers)})  # all widths, side by side
    quantize(model, plan).save_pretrained(tmp_path / "base")
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), ids % 256)
    assert torch.equal(logits(model, ids % 256), base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    groups = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {2, 3, 4}
    adapted = get_peft_model(loaded, SGRQConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(adapted, ids % 256), base)
    train_steps(adapted, ids % 256)
    unmerged = logits(adapted.eval(), ids % 256)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids % 256), unmerged)


def test_other_tools_are_told_the_same(tmp_path, ids):
    model = bits16()
    plan = allocate_bits(model, [ids % 256], bits=3.2, group_size=32, progress=False)
    assert {name: fields["bits"] for name, fields in plan.autoround().items()} == plan.layers
    assert plan.autoround()["model.layers.0.mlp.down_proj"]["group_size"] == -1  # 172 columns
    assert {fields["bits"] for fields in plan.gptqmodel().values()} == set(plan.layers.values())
    assert "+:^model\\.layers\\.0\\.mlp\\.up_proj$" in plan.gptqmodel()
    one_a_row = plan.gptqmodel()["+:^model\\.layers\\.0\\.mlp\\.down_proj$"]
    assert one_a_row["group_size"] == -1 and one_a_row["act_group_aware"] is False  # which needs groups
    named = [name for group in plan.quantization_config()["config_groups"].values() for name in group["targets"]]
    assert sorted(named) == sorted(plan.layers)
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan
    assert "bits a weight" in plan.table()


def test_sizes_are_bytes_however_they_are_spelled():
    assert {size_in_bytes(size, "bits") for size in ("3GB", "3gb", "3 Gb", "3000MB", "3000mb")} == {3 * 10**9}
    assert size_in_bytes("1kib", "bits") == 1024


def test_mistakes_are_refused(ids):
    model = bits16("mistral")
    for settings, error, message in (
        ({"bits": 1.5}, ValueError, "the smallest widths take 2.2"),
        ({"bits": "1KB"}, ValueError, "the smallest widths take"),
        ({"bits": float("nan")}, ValueError, "positive"),
        ({"bits": None}, TypeError, "bits a weight"),
        ({"widths": (1, 2)}, ValueError, "from 2 to 8"),
        ({"widths": ()}, TypeError, "2, 3, 4"),
        ({"criterion": "hessian"}, ValueError, "fisher"),
        ({"pairs": True}, ValueError, "measured"),
    ):
        with pytest.raises(error, match=message):
            allocate_bits(model, [ids % 256], progress=False, **settings)


@pytest.mark.slow
def test_the_command_writes_a_plan_and_a_checkpoint(llama_dir, tmp_path):
    from peft_sgrq.cli import main

    text = tmp_path / "text.txt"
    text.write_text("More bits for the layers that need them, fewer for the others. " * 20)
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    arguments = ["--bits", "3.6", "--checkpoint", out, "--quiet", "--max-length", "32"]
    assert main(["allocate", str(llama_dir), str(text), "-o", plan, *arguments]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {"plan", "compressed_tensors", "autoround", "gptqmodel"} < set(found)
    assert BitPlan.load(plan).layers == found["plan"]["layers"]
    with pytest.raises(ValueError, match="expected a saved 'rotations'"):
        Rotations.load(plan)
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.quant_method == "compressed-tensors"
