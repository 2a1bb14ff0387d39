"""`verify` of models merged in memory: after trainers, with new heads or resized vocabularies; and of wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from support.bases import TRAINING, byte_tokenizer
from support.quantized_checkpoints import edit_config, tensors_of
from support.small_models import TIED, in_nf4, save
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
)
from trl import SFTConfig, SFTTrainer

from peft_sgrq import SGRQConfig, verify_checkpoint
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.checkpoint.config_fields import compare


@pytest.fixture(scope="module")
def base(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in nf4, with its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=quantization).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def merged(model: Any, root: Path, **config: Any) -> tuple[Path, Path]:
    """The folders of an adapter of a model and of the model it was merged into."""
    disable_cpu_packing(model)
    adapted = get_peft_model(model, SGRQConfig(init_weights=False, **config))
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    return root / "adapter", root / "merged"


def with_head(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)


def resized(base: Path, size: int = 262) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def test_a_merge_after_sft_is_right_and_what_the_trainer_wrote_is_noted(base, tmp_path):
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(**TRAINING, output_dir=str(tmp_path / "out"), max_steps=1, bf16=False, max_length=32),
        train_dataset=Dataset.from_dict({"text": [f"number {i}" for i in range(4)]}),
        peft_config=SGRQConfig(task_type="CAUSAL_LM"),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer = trainer.processing_class
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=16)
    tokenizer.save_pretrained(tmp_path / "merged")
    report = verify_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.errors == []
    assert any("use_cache = False" in note for note in report.notes)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (with_head, {"task_type": "SEQ_CLS"}),
        (resized, {"task_type": "CAUSAL_LM"}),
        (resized, {"task_type": "CAUSAL_LM", "trainable_token_indices": [5, 260]}),
        (lambda base: AutoModel.from_pretrained(base), {"task_type": "FEATURE_EXTRACTION"}),
        (lambda base: AutoModel.from_pretrained(base), {}),
    ],
    ids=["new-head", "resized", "resized-rows", "no-head", "no-head-no-task"],
)
def test_what_only_a_merge_in_memory_can_make_is_compared_with_the_adapter(make, config, base, tmp_path):
    adapter, out = merged(make(base), tmp_path, **config)
    report = verify_checkpoint(base, adapter, out)
    assert report.errors == []
    assert report.merged >= 14


def test_a_resized_vocabulary_may_be_tied(tmp_path):
    path = in_nf4(save(TIED["llama"], tmp_path / "dense"), tmp_path / "base")
    adapter, out = merged(resized(path, 131), tmp_path, task_type="CAUSAL_LM")
    assert verify_checkpoint(path, adapter, out).errors == []


def _changed(end: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        tensors = tensors_of(out)
        name = next(name for name in tensors if name.endswith(end))
        made = change(tensors.pop(name))
        save_file({**tensors, **({} if made is None else {name: made.contiguous()})}, out / "model.safetensors")

    return spoil


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], Callable[[Path], None], str]] = {
    "another head": (with_head, {"task_type": "SEQ_CLS"}, _changed("score.weight", lambda t: -t), "score.weight"),
    "no head": (
        with_head,
        {"task_type": "SEQ_CLS"},
        _changed("score.weight", lambda t: None),
        "score.weight is missing",
    ),
    "a code": (with_head, {"task_type": "SEQ_CLS"}, _changed("q_proj.weight", lambda t: t ^ 1), "q_proj.weight"),
    "a scale": (resized, {"task_type": "CAUSAL_LM"}, _changed("absmax", lambda t: t * 1.0000002), "absmax"),
    "an old row": (resized, {"task_type": "CAUSAL_LM"}, _changed("embed_tokens.weight", lambda t: t.flip(0)), "embed"),
    "too few rows": (resized, {"task_type": "CAUSAL_LM"}, _changed("lm_head.weight", lambda t: t[:-1]), "lm_head"),
    "a lost norm": (with_head, {"task_type": "SEQ_CLS"}, _changed("model.norm.weight", lambda t: None), "is missing"),
    "other labels": (
        with_head,
        {"task_type": "SEQ_CLS"},
        lambda out: edit_config(out, id2label={str(i): str(i) for i in range(5)}, label2id={}),
        "score.weight has shape",
    ),
    "another size": (resized, {"task_type": "CAUSAL_LM"}, lambda out: edit_config(out, vocab_size=300), "has shape"),
    "another activation": (
        with_head,
        {"task_type": "SEQ_CLS"},
        lambda out: edit_config(out, hidden_act="relu"),
        "relu",
    ),
    "another block size": (
        with_head,
        {"task_type": "SEQ_CLS"},
        lambda out: edit_config(out, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "load_in_8bit",
    ),
    "another class": (
        lambda base: AutoModelForCausalLM.from_pretrained(base),
        {"task_type": "CAUSAL_LM"},
        lambda out: edit_config(out, architectures=["LlamaModel"]),
        "architectures",
    ),
    "no config": (resized, {"task_type": "CAUSAL_LM"}, lambda out: (out / "config.json").unlink(), "config.json is"),
}


@pytest.fixture(scope="module")
def right(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    made: dict[Any, tuple[Path, Path]] = {}

    def of(make: Callable[[Path], Any], config: dict[str, Any]) -> tuple[Path, Path]:
        if make not in made:
            made[make] = merged(make(base), tmp_path_factory.mktemp("right"), **config)
        return made[make]

    return of


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_is_called_wrong(name, right, base, tmp_path):
    make, config, spoil, complaint = WRONG[name]
    adapter, out = right(make, config)
    shutil.copytree(out, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    report = verify_checkpoint(base, adapter, tmp_path / "spoiled")
    assert any(complaint in error for error in report.errors), report.errors


# fields

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "use_cache", False),
        ("config.json", "pad_token_id", 2),
        ("config.json", "eos_token_id", [1, 2]),
        ("config.json", "problem_type", "regression"),
        ("config.json", "attention_dropout", 0.1),
        ("config.json", "output_router_logits", True),
        ("generation_config.json", "temperature", 0.6),
        ("tokenizer_config.json", "local_files_only", True),
        ("tokenizer_config.json", "padding_side", "left"),
        ("tokenizer_config.json", "eos_token", "<|im_end|>"),
        ("tokenizer.json", "truncation", {"max_length": 32}),
    ],
)
def test_fields_by_which_no_weight_is_read_are_notes(file, field, value):
    base = dict(LLAMA) if file == "config.json" else {}
    found = compare(file, base, {**base, field: value})
    assert found.errors == []
    assert len(found.notes) == 1
    assert field in found.notes[0]


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "hidden_act", "relu"),
        ("config.json", "rope_theta", 5e5),
        ("config.json", "num_hidden_layers", 3),
        ("config.json", "tie_word_embeddings", True),
        ("config.json", "architectures", ["LlamaModel"]),
        ("config.json", "vocab_size", 7),
        ("config.json", "of_its_own", 1),
        ("config.json", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("tokenizer_config.json", "add_bos_token", True),
        ("tokenizer.json", "model", {"vocab": {}}),
        ("preprocessor_config.json", "padding_side", "left"),
    ],
)
def test_fields_that_matter_are_errors(file, field, value):
    base = dict(LLAMA) if file == "config.json" else {}
    assert len(compare(file, base, {**base, field: value}).errors) >= 1


def test_fields_of_the_parts_of_a_model_are_compared_likewise():
    base = {"model_type": "of_its_own", "text_config": {"use_cache": True, "hidden_act": "silu"}, "dtype": "float32"}
    found = compare("config.json", base, {**base, "text_config": {"hidden_act": "relu", "dtype": "float32"}})
    assert [error.split(" = ")[0] for error in found.errors] == ["config.json has text_config.hidden_act"]
    assert [note.split(" = ")[0] for note in found.notes] == ["config.json has text_config.use_cache"]


def test_a_config_that_another_version_saved_in_full_is_the_same():
    settings = {key: value for key, value in LLAMA.items() if key != "model_type"}
    full = json.loads(LlamaConfig(**settings).to_json_string(use_diff=False))
    found = compare("config.json", LLAMA, full)
    assert (found.errors, found.notes) == ([], [])
