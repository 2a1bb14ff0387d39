"""Models quantized at few bits: exact with an adapter, in memory and through files, and causal."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.bases import logits, train_steps
from support.rotated_models import assert_same, random_model, state
from transformers import AutoModelForCausalLM

import peft_sgrq
from peft_sgrq import BitPlan, SGRQConfig, quantize, rotate
from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.rounding import quantized_weight
from peft_sgrq.rotation.scheme import Scheme, parse_scheme

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:The model has online rotations")


@pytest.mark.parametrize(
    ("scheme", "rotations"),
    [("W4A16", ()), ("W4A8KV8", ("R1",)), ("W4A4KV8", ("R1", "R2")), ("W4A4KV4", ("R1", "R2", "R3", "R4"))],
)
def test_no_delta_is_the_base_and_merged_is_unmerged_is_reloaded(scheme, rotations, llama_dir, tmp_path, ids):
    load = peft_sgrq.load_rotated if "R4" in rotations else AutoModelForCausalLM.from_pretrained
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    dense = logits(model, ids)
    if rotations:
        rotate(model, rotations=rotations)
    quantize(model, scheme).save_pretrained(tmp_path / "base")
    base = logits(model, ids)
    assert not torch.equal(base, dense)
    assert torch.equal(logits(load(tmp_path / "base").eval(), ids), base)
    adapted = get_peft_model(load(tmp_path / "base"), SGRQConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(adapted, ids), base)
    train_steps(adapted, ids)
    missing = [name for name, delta in adapted.named_parameters() if delta.requires_grad and not delta.abs().max()]
    assert not missing, "deltas that nothing was learned in"
    unmerged = logits(adapted.eval(), ids)
    assert not torch.equal(unmerged, base)
    adapted.save_pretrained(tmp_path / "adapter")
    peft_sgrq.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged, ids), unmerged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged").eval(), ids), unmerged)
    assert torch.equal(logits(load(tmp_path / "files").eval(), ids), unmerged)


def test_a_model_is_adapted_right_after_it_was_quantized(llama_dir, ids):
    model = quantize(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval(), "W4A8KV8")
    adapted = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
    train_steps(adapted, ids)
    unmerged = logits(adapted.eval(), ids)
    adapted.merge_adapter()
    assert torch.equal(logits(adapted, ids), unmerged)


def test_a_model_that_was_used_is_saved_and_adapted_as_one_that_was_not(llama_dir, tmp_path, ids):
    """compressed-tensors unpacks a model for good when it is used, and leaves no codes to be saved."""
    model = quantize(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16).eval(), "W8A8KV8")
    packed, used = state(model), logits(model, ids)
    model.generate(ids[:, :4], max_new_tokens=2, pad_token_id=0)
    assert_same(model, packed)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), used)
    assert torch.equal(logits(get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM")).eval(), ids), used)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_model_stays_as_it_was_when_packing_ends_early(error, monkeypatch, ids):
    from compressed_tensors.compressors.model_compressors import model_compressor

    model, calls = random_model("llama with biases"), []
    model.lm_head.requires_grad_(False)
    before, output = state(model), logits(model, ids % 256)
    fields, modules = copy.deepcopy(vars(model.config)), [name for name, _ in model.named_modules()]
    parameters = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    compress = model_compressor.compress_module

    def compress_some(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise error
        compress(*arguments)

    monkeypatch.setattr(model_compressor, "compress_module", compress_some)
    with pytest.raises(error):
        quantize(model, "W4A4KV4")
    assert_same(model, before)
    assert parameters == {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
    assert vars(model.config) == fields and not getattr(model, "is_quantized", False)
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits(model, ids % 256), output)
    monkeypatch.undo()
    quantize(model, "W4A4KV4")


@pytest.mark.parametrize("scheme", ["W8A16KV4", "W4A4KV4"])
def test_what_comes_later_changes_nothing_before_it(scheme, llama_dir, ids):
    model = quantize(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval(), scheme)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    one, two = logits(model, ids), logits(model, other)
    assert torch.equal(one[:, :-1], two[:, :-1]) and not torch.equal(one[:, -1], two[:, -1])


def test_weights_are_packed_and_the_cache_is_rounded(llama_dir, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16).eval()
    dense = state(model)
    quantize(model, "W4A16KV4", group_size=32).save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in dense.items():
        if "proj" in name:
            assert tensors[f"{name}_packed"].shape == (weight.shape[0], weight.shape[1] // 8)
            assert tensors[f"{name}_scale"].shape == (weight.shape[0], weight.shape[1] // 32)
            assert tensors[f"{name}_scale"].dtype == torch.bfloat16
    with_cache = logits(model, ids)
    for module in model.modules():
        if hasattr(module, "kv_cache"):
            module.quantization_enabled = False
    assert not torch.equal(logits(model, ids), with_cache)


def test_clipping_is_never_worse_than_none():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) ** 3
    for bits in (2, 3, 4):
        args = Scheme(bits).weight_args(bits, by_row=False)
        clipped = (quantized_weight(weight, args) - weight).square().unflatten(1, (-1, 64)).sum(-1)
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = weight.unflatten(1, (-1, 64))
        plain = fake_quantize(weight, *calculate_qparams(groups.amin(-1), groups.amax(-1), args), args)
        whole = (plain - weight).square().unflatten(1, (-1, 64)).sum(-1)
        assert bool((clipped <= whole).all()) and clipped.sum() < 0.95 * whole.sum()


def test_layers_whose_columns_no_group_divides_get_a_scale_a_row(tmp_path, ids):
    model = random_model("llama with biases")
    quantize(model, "W4A8").save_pretrained(tmp_path / "out")
    scales = {name: len(t[0]) for name, t in model.state_dict().items() if name.endswith("weight_scale")}
    assert scales["model.layers.0.mlp.down_proj.weight_scale"] == 1  # of 172 columns
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids % 256), logits(model, ids % 256)
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_rounds_its_cache_when_the_original_is_gone(adapted, llama_dir, tmp_path, ids):
    model = quantize(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval(), "W8A16KV4")
    if adapted:
        model.save_pretrained(tmp_path)
        del model
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path), SGRQConfig(task_type="CAUSAL_LM")
        ).eval()
    expected = logits(model, ids)
    copied = copy.deepcopy(copy.deepcopy(model))
    del model
    gc.collect()
    assert torch.equal(logits(copied, ids), expected)


def test_compressed_tensors_still_ties_copies_of_caches_to_the_original(llama_dir, tmp_path, ids):
    quantize(AutoModelForCausalLM.from_pretrained(llama_dir), "W8A16KV4").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = logits(model, ids)
    copied = copy.deepcopy(model)
    del model
    gc.collect()
    assert not torch.equal(logits(copied, ids), expected)


def test_layers_that_are_ignored_stay():
    model = random_model("mistral")
    name = "model.layers.1.mlp.down_proj"
    before = model.get_submodule(name).weight.clone()
    quantize(model, ignore=[name])
    assert torch.equal(model.get_submodule(name).weight, before)
    assert hasattr(model.model.layers[0].mlp.down_proj, "weight_packed")


def test_the_head_of_a_classifier_stays_and_is_trained_whole(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = quantize(LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=64, num_labels=3)))
    assert hasattr(model.model.layers[0].mlp.up_proj, "weight_packed") and not hasattr(model.score, "weight_packed")
    model.save_pretrained(tmp_path)
    adapted = get_peft_model(LlamaForSequenceClassification.from_pretrained(tmp_path), SGRQConfig(task_type="SEQ_CLS"))
    assert any("score" in name for name, one in adapted.named_parameters() if one.requires_grad)


def test_zero_points_of_activations_and_cache_are_an_option(llama_dir, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    quantize(model, "W4A4KV4", symmetric=False).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, ids), logits(model, ids))
    assert reloaded.config.quantization_config.quantization_config.kv_cache_scheme.symmetric is False


def test_what_cannot_be_quantized_is_refused_and_stays():
    for kind, settings, message in (
        ("qwen3 moe", {}, "experts"),
        ("mistral", {"scheme": "W4"}, "expected weights, activations"),
        ("mistral", {"ignore": ["q_proj"]}, "expected names of linear layers"),
    ):
        model = random_model(kind)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            quantize(model, **settings)
        assert_same(model, before)
    model = random_model("mistral")
    before = state(model)
    for scheme, settings, error, message in (
        ("W4A16", {"ignore": "lm_head"}, TypeError, "in a list"),
        ("W4A16", {"symmetric": None}, TypeError, "True or False"),
        (BitPlan(dict.fromkeys(quantizable_layers(model), 9), 64, 9, 1, 1, "fisher"), {}, ValueError, "2 to 8"),
    ):
        with pytest.raises(error, match=message):
            quantize(model, scheme, **settings)
        assert_same(model, before)
    with torch.inference_mode():
        of_inference = random_model("mistral")
    parametrized = random_model("mistral")
    torch.nn.utils.parametrizations.weight_norm(parametrized.model.layers[0].mlp.up_proj)
    for model, message in ((of_inference, "inference mode"), (parametrized, "remove_parametrizations")):
        for change in (quantize, rotate):
            with pytest.raises(ValueError, match=message):
                change(model)
    for value in (float("nan"), float("inf")):
        model = random_model("mistral")
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has NaN or infinite"):
            quantize(model)
    model = quantize(random_model("mistral"))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model)
    with pytest.raises(TypeError, match="a name such as"):
        parse_scheme(4)
    for change in (quantize, rotate):
        with pytest.raises(TypeError, match="The model is a str, expected one in memory"):
            change("org/model")


def test_transformers_still_does_not_load_packed_zero_points(tmp_path, monkeypatch):
    from compressed_tensors.quantization import QuantizationArgs

    monkeypatch.setattr(
        Scheme,
        "weight_args",
        lambda self, bits, by_row: QuantizationArgs(
            num_bits=bits, type="int", symmetric=False, strategy="group", group_size=64
        ),
    )
    quantize(random_model("mistral")).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
