"""The code that errors and cards print loads the base: it is run, for models of all kinds and for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import AutoPeftModel, PeftModel, get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, logits
from support.library_formats import FORMATS
from support.printed_code import refusal, run_card, run_refusal
from support.quantized_checkpoints import FORMATS as FILES
from support.quantized_checkpoints import FP8_BLOCKS
from torch import nn

from peft_sgrq import SGRQConfig, split_groups
from peft_sgrq.base.loading import describe_class

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}
del VISION["vocab_size"]
MODELS: dict[str, tuple[str, Any, str | None, str]] = {
    "llama": ("LlamaForCausalLM", lambda: tr.LlamaConfig(**SMALL), "CAUSAL_LM", "AutoModelForCausalLM"),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: tr.LlavaConfig(
            vision_config=tr.CLIPVisionConfig(**VISION), text_config=tr.LlamaConfig(**SMALL), image_token_index=299
        ),
        "CAUSAL_LM",
        "AutoModelForImageTextToText",
    ),
    "bert": ("BertForMaskedLM", lambda: tr.BertConfig(**SMALL), None, "AutoModelForMaskedLM"),
    "bert without a head": ("BertModel", lambda: tr.BertConfig(**SMALL), "FEATURE_EXTRACTION", "AutoModel"),
    "five labels": (
        "BertForSequenceClassification",
        lambda: tr.BertConfig(**SMALL, num_labels=5),
        None,
        "AutoModelForSequenceClassification",
    ),
    "vit": ("ViTForImageClassification", lambda: tr.ViTConfig(**VISION), None, "AutoModelForImageClassification"),
    "clip": (
        "CLIPModel",
        lambda: tr.CLIPConfig(vision_config=VISION, text_config={**SMALL, "projection_dim": 32}, projection_dim=32),
        None,
        "AutoModel",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda: tr.WhisperConfig(
            vocab_size=300,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            pad_token_id=2,
            decoder_start_token_id=1,
            bos_token_id=0,
            eos_token_id=1,
        ),
        "SEQ_2_SEQ_LM",
        "AutoModelForSpeechSeq2Seq",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: tr.T5Config(
            vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
        ),
        None,
        "AutoModelForSeq2SeqLM",
    ),
    "no auto class": (
        "T5EncoderModel",
        lambda: tr.T5Config(d_model=64, d_kv=16, num_layers=1),
        None,
        "T5EncoderModel",
    ),
}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("with_task", [True, False], ids=["task", "no task"])
def test_the_printed_code_loads_models_of_every_kind(kind, with_task, tmp_path: Path):
    name, make, task, expected = MODELS[kind]
    cls = getattr(tr, name)
    if with_task and task is None:
        pytest.skip("PEFT has no task for it")
    torch.manual_seed(0)
    cls(make()).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        cls.from_pretrained(tmp_path / "base"),
        SGRQConfig(task_type=task if with_task else None, init_weights=False, group_size=32),
    )
    model.save_pretrained(tmp_path / "adapter")
    found = run_card(tmp_path / "adapter", tmp_path / "run")
    assert type(found["base"]) is cls and f"{expected}.from_pretrained" in (tmp_path / "adapter/README.md").read_text()
    torch.manual_seed(1)
    base = run_refusal(refusal(tmp_path / "adapter", cls(make())))
    assert same(PeftModel.from_pretrained(base, tmp_path / "adapter"), model.eval())
    if not with_task:
        assert same(AutoPeftModel.from_pretrained(tmp_path / "adapter"), model)


def test_a_part_of_a_checkpoint_is_loaded_by_its_own_class(tmp_path: Path):
    vision = {**VISION, "vision_use_head": False}
    config = tr.Gemma3Config(
        text_config={**SMALL, "head_dim": 16, "num_key_value_heads": 2}, vision_config=vision, mm_tokens_per_image=4
    )
    tr.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = tr.Gemma3ForCausalLM.from_pretrained(tmp_path)
    assert describe_class(model) == {"base_model_class": "Gemma3ForCausalLM", "parent_library": "transformers"}


class Own(tr.LlamaForCausalLM):
    """A class of somebody's own."""


def test_a_class_of_ones_own_is_imported_and_one_made_on_the_fly_is_seen_through(llama_dir: Path):
    model = Own.from_pretrained(llama_dir)
    assert describe_class(model) == {"base_model_class": "Own", "parent_library": __name__}
    model.__class__ = type("FSDPOwn", (Own,), {})
    assert describe_class(model) == {"base_model_class": "Own", "parent_library": __name__}
    assert describe_class(nn.Sequential(nn.Linear(4, 4))) is None


def check(model: Any, adapter: Path, scratch: Path, wrong: nn.Module, ids: torch.Tensor) -> None:
    """Saves an adapter, runs what its card and its refusal print, and compares with the bits of the model."""
    expected = logits(model.eval(), ids)
    model.save_pretrained(adapter)
    found = run_card(adapter, scratch)
    base = run_refusal(refusal(adapter, wrong))
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter).eval(), ids), expected)
    assert torch.equal(logits(found["merged"].eval(), ids), expected)


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
def test_what_is_printed_for_bitsandbytes_and_dense_bases_runs(base: Base, llama_dir: Path, tmp_path: Path, ids):
    wrong = NF4 if base is DENSE else DENSE
    check(adapted(base, llama_dir), tmp_path / "adapter", tmp_path / "run", wrong.load(llama_dir), ids)


# Of those whose code differs in numbers alone one; quantizing by HQQ takes seconds.
_ALIKE = [f for f in FORMATS if "hqq" in f.name or "intx" in f.name]
_DIFFERENT = [f for f in FORMATS if f not in _ALIKE or f.name in ("hqq-4bit-axis1", "torchao-intx4")]


@pytest.mark.slow
@pytest.mark.parametrize("format", _DIFFERENT, ids=lambda format: format.name)
def test_what_is_printed_for_formats_of_other_libraries_runs(format, llama_dir: Path, tmp_path: Path, ids):
    format.require()
    model = get_peft_model(
        format.load(llama_dir, format.dtype), SGRQConfig(task_type="CAUSAL_LM", ratio=0.5, init_weights=False)
    )
    check(model, tmp_path / "adapter", tmp_path / "run", DENSE.load(llama_dir), ids)


_PACKED = [FP8_BLOCKS, *(f for f in FILES if f.name == "compressed-tensors-W4A16")]


@pytest.mark.parametrize("format", _PACKED, ids=lambda format: format.name)
def test_what_is_printed_for_checkpoints_that_are_quantized_runs(format, tmp_path: Path, ids):
    base = format.make(tmp_path)
    model = format.adapted(base, init_weights=False)
    wrong = tr.AutoModelForCausalLM.from_config(tr.AutoConfig.from_pretrained(tmp_path / "dense"))
    check(model, tmp_path / "adapter", tmp_path / "run", wrong, ids)


def test_what_is_printed_for_a_split_base_runs(llama_dir: Path, tmp_path: Path, ids):
    model = get_peft_model(
        split_groups(NF4.load(llama_dir), 32), SGRQConfig(task_type="CAUSAL_LM", init_weights=False)
    )
    check(model, tmp_path / "adapter", tmp_path / "run", NF4.load(llama_dir), ids)
