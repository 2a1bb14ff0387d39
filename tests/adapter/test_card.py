"""The model card: beside every saved adapter, true, and never at the cost of somebody's text."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import ModelCard
from peft import get_peft_model
from support.bases import DENSE, NF4_NESTED, TRAINING, adapted
from transformers import Trainer, TrainingArguments

from peft_sgrq import SGRQConfig
from peft_sgrq.adapter.training_record import _data


@pytest.fixture
def saved(llama_dir: Path, tmp_path: Path) -> Path:
    adapted(NF4_NESTED, llama_dir).save_pretrained(tmp_path)
    return tmp_path


def test_card_names_base_quantization_ratio_size_and_how_to_load_and_merge(saved: Path, llama_dir: Path):
    text = (saved / "README.md").read_text()
    assert f"`{llama_dir}`" in text
    assert "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True" in text
    assert "import peft_sgrq" in text
    assert "| ratio of trained scales | 0.5 |" in text
    assert "merge_and_unload()" in text
    assert "sgrq" in ModelCard.load(saved / "README.md").data.tags


def test_card_counts_the_trained_parameters(llama_dir: Path, tmp_path: Path):
    model = adapted(NF4_NESTED, llama_dir)
    model.save_pretrained(tmp_path)
    trained = model.get_nb_trainable_parameters()[0]
    assert f"| trained parameters | {trained:,} (float32) |" in (tmp_path / "README.md").read_text()


def test_code_on_the_card_is_python(saved: Path):
    for block in re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_saving_again_leaves_one_section(saved: Path, llama_dir: Path):
    adapted(NF4_NESTED, llama_dir, ratio=1.0).save_pretrained(saved)
    text = (saved / "README.md").read_text()
    assert text.count("An adapter of `peft_sgrq`") == 1
    assert "| ratio of trained scales | 1 |" in text
    assert "most salient" not in text
    assert "| criterion | none, all are trained |" in text


def test_text_of_others_is_kept(saved: Path, llama_dir: Path):
    card = ModelCard.load(saved / "README.md")
    card.text = "# My adapter\n\nIt speaks like a pirate.\n"
    card.data["license"] = "mit"
    card.save(saved / "README.md")
    adapted(NF4_NESTED, llama_dir).save_pretrained(saved)
    card = ModelCard.load(saved / "README.md")
    assert "It speaks like a pirate." in card.text
    assert "An adapter of `peft_sgrq`" in card.text
    assert card.data.license == "mit"


def test_our_section_comes_first_and_trl_s_text_names_no_none(saved: Path, llama_dir: Path):
    trl = (
        "# Model Card for out\n\nThis model is a fine-tuned version of [None](https://huggingface.co/None).\n\n"
        '```python\ngenerator = pipeline("text-generation", model="None", device="cuda")\n```\n'
    )
    card = ModelCard.load(saved / "README.md")
    card.text = trl
    card.save(saved / "README.md")
    for _ in range(2):
        adapted(NF4_NESTED, llama_dir).save_pretrained(saved)
    text = ModelCard.load(saved / "README.md").text
    assert text.index("An adapter of `peft_sgrq`") < text.index("# Model Card for out")
    assert "None" not in text and f"fine-tuned version of `{llama_dir}`" in text


def test_the_card_names_the_layers_that_were_tuned(saved: Path):
    text = (saved / "README.md").read_text()
    assert "`q_proj`" in text and "`down_proj`" in text


def test_a_config_saved_alone_gets_no_card(tmp_path: Path):
    SGRQConfig().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_card_of_a_dense_base_names_no_quantization(llama_dir: Path, tmp_path: Path):
    adapted(DENSE, llama_dir).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "BitsAndBytesConfig(" not in text
    assert "| quantization of the base | none (dense) |" in text


def test_the_card_says_what_a_trainer_trained_with(llama_dir: Path, tmp_path: Path):
    model = get_peft_model(NF4_NESTED.load(llama_dir), SGRQConfig(task_type="CAUSAL_LM"))
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 6
    settings = {**TRAINING, "learning_rate": 3e-2, "max_steps": 3, "per_device_train_batch_size": 2, "seed": 7}
    settings |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "| data | 6 rows |\n| steps | 3 |\n| batch size | 4 (2 x 2 accumulated x 1 processes) |" in text
    assert "| learning rate | 0.03, cosine, warm-up 0 |" in text
    assert "| seed | 7 |" in text and "weight decay 0 |" in text
    assert "| steps | 2 |" in (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert "trained_with" not in (tmp_path / "adapter_config.json").read_text()


def test_without_a_trainer_the_card_says_nothing_of_training(saved: Path):
    text = (saved / "README.md").read_text()
    assert "learning rate" not in text and "| steps |" not in text


def test_a_dataset_of_the_hub_is_named_and_a_file_is_not(tmp_path: Path):
    (tmp_path / "secret.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    local = load_dataset(
        "json", data_files=str(tmp_path / "secret.jsonl"), split="train", cache_dir=tmp_path / "cache"
    )
    assert _data(local) == "2 rows"
    place = tmp_path / "cache" / "trl-lib___capybara" / "default" / "part.arrow"
    place.parent.mkdir(parents=True)
    with ArrowWriter(path=str(place)) as writer:
        writer.write_table(local.data.table)
        writer.finalize()
    assert _data(Dataset.from_file(str(place))) == "`trl-lib/capybara`, 2 rows"
