"""lm-eval gives an adapter and the model it was merged into equal numbers. `make serving` makes its environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_sgrq import SGRQConfig, merge_checkpoint
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

PYTHON = os.environ.get("PEFT_SGRQ_LM_EVAL")  # the interpreter of an environment with lm-eval and peft_sgrq
REPOSITORY = Path(__file__).resolve().parents[2]
DENSE = REPOSITORY / "examples" / "demo_model"
TASK = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        PYTHON is None, reason="PEFT_SGRQ_LM_EVAL names no interpreter with lm-eval; `make serving` does"
    ),
]


def _evaluated(folder: Path, name: str, arguments: str) -> list[list[float]]:
    """The log-likelihood of each choice of each question, as lm-eval logs them."""
    out = folder / name
    command = [
        str(PYTHON), "-m", "lm_eval", "--model", "hf", "--model_args", f"{arguments},dtype=bfloat16",
        "--tasks", "endings", "--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "4",
        "--output_path", str(out),
        "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("samples_endings_*.jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    return [[float(answer[0][0]) for answer in row["resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
REPACKED = pytest.mark.skipif(
    bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks merged 4-bit layers on CPUs with AVX512-BF16"
)


@pytest.mark.parametrize(
    "quantization", [pytest.param(NF4, id="nf4", marks=REPACKED), pytest.param({"load_in_8bit": True}, id="int8")]
)
def test_an_adapter_and_its_merged_model_have_equal_likelihoods(quantization, tmp_path):
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    config = BitsAndBytesConfig(**quantization)
    model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.bfloat16, quantization_config=config)
    disable_cpu_packing(model)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(DENSE).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), SGRQConfig(task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    merge_checkpoint(base, adapter, merged)
    rows = [
        {"context": f"The value {i} of the type", "choices": ["is an integer", "is a string of text"], "label": i % 2}
        for i in range(6)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "endings.yaml").write_text(TASK.format(file=questions))
    found = {
        name: _evaluated(tmp_path, f"out-{name}", arguments)
        for name, arguments in {
            "base": f"pretrained={base}",
            "adapter": f"pretrained={base},peft={adapter}",
            "merged": f"pretrained={merged}",
        }.items()
    }
    assert len(found["merged"]) == 6 and found["adapter"] == found["merged"] != found["base"]
