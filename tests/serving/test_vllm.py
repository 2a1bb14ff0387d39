"""What vLLM serves is what was merged. vLLM has its own environment; `make serving` makes it and runs these tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from math import exp, sqrt
from pathlib import Path
from statistics import correlation, mean
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model
from support.quantized_checkpoints import _by_compressed_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_sgrq import SGRQConfig, merge_checkpoint, split_groups
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

PYTHON = os.environ.get("PEFT_SGRQ_VLLM")  # the interpreter of vLLM's environment
REPOSITORY = Path(__file__).resolve().parents[2]
DENSE = REPOSITORY / "examples" / "demo_model"
LENGTH = 48

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(PYTHON is None, reason="PEFT_SGRQ_VLLM names no interpreter with vLLM; `make serving` does"),
]


class Served(NamedTuple):
    """Log-probabilities of the same tokens, those of all prompts in a row."""

    base: list[float]
    files: list[float]
    memory: list[float]
    split: list[float] | None
    quantization: str
    base_here: list[float]
    merged_here: list[float]


def _bitsandbytes(**settings: Any) -> Callable[[Path, Path], None]:
    def save(dense: Path, out: Path) -> None:
        config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **settings)
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config).save_pretrained(
            out
        )

    return save


def _torchao(dense: Path, out: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config).save_pretrained(out)


def _gptqmodel(**settings: Any) -> Callable[[Path, Path], None]:
    def save(dense: Path, out: Path) -> None:
        from gptqmodel import GPTQModel, QuantizeConfig

        rows = _windows("results.md", AutoTokenizer.from_pretrained(dense))[:32]
        data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
        config = QuantizeConfig(bits=4, group_size=64, offload_to_disk=False, **settings)
        quantizer = GPTQModel.load(str(dense), config, device="cpu")
        quantizer.quantize(data, batch_size=1)
        quantizer.save(str(out))

    return save


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# The format, and how well the change of log-probabilities here and there must correlate: where activations are
# quantized too, or kernels round otherwise, what a small change does is nearer to the noise between the two.
FORMATS: dict[str, tuple[Callable[[Path, Path], None], float]] = {
    "nf4": (_bitsandbytes(**NF4), 0.99),
    "nf4-nested": (_bitsandbytes(**NF4, bnb_4bit_use_double_quant=True), 0.99),
    "int8": (_bitsandbytes(load_in_8bit=True), 0.95),
    "torchao-int8": (_torchao, 0.98),
    "W4A16": (_by_compressed_tensors("W4A16"), 0.99),
    "W8A8": (_by_compressed_tensors("W8A8"), 0.9),
    "FP8_DYNAMIC": (_by_compressed_tensors("FP8_DYNAMIC"), 0.9),
}
if find_spec("gptqmodel") and find_spec("optimum"):  # `make serving` has them
    FORMATS["gptq"] = (_gptqmodel(desc_act=False), 0.98)
    FORMATS["awq"] = (_gptqmodel(method="awq", format="gemm", sym=False), 0.98)


def _windows(name: str, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer((REPOSITORY / "docs" / name).read_text(), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def _load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    disable_cpu_packing(model)
    return model


def _tuned(model: Any, rows: torch.Tensor) -> Any:
    """An adapter that has learnt something, in a few steps."""
    model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM")).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-2, betas=(0.5, 0.999), weight_decay=0.0)
    for batch in rows[:24].split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def _logprobs(model: Any, prompts: torch.Tensor) -> list[float]:
    logits = model(input_ids=prompts).logits.float().log_softmax(-1)
    return logits[:, :-1].gather(-1, prompts[:, 1:, None]).flatten().tolist()


def _ask(models: dict[str, Path], prompts: torch.Tensor, folder: Path) -> dict[str, Any]:
    asked, answered = folder / "questions.json", folder / "answers.json"
    asked.write_text(json.dumps({"prompts": prompts.tolist(), "models": {k: str(v) for k, v in models.items()}}))
    script = Path(__file__).with_name("ask_vllm.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(script), str(asked), str(answered)], env=environment, capture_output=True, text=True
    )
    assert answered.exists(), done.stderr[-3000:]
    return json.loads(answered.read_text())


def _folders(name: str, folder: Path) -> tuple[dict[str, Path], dict[str, list[float]], torch.Tensor]:
    """The base, merged on files and in memory, and for a split base that too; log-probabilities of base and merged."""
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    prompts = _windows("guide.md", tokenizer)[:8]
    folders = {kind: folder / f"{name}-{kind}" for kind in ("base", "files", "memory")}
    FORMATS[name][0](DENSE, folders["base"])
    tokenizer.save_pretrained(folders["base"])
    here = {"base": _logprobs(_load(folders["base"]), prompts)}
    model = _tuned(_load(folders["base"]), _windows("results.md", tokenizer))
    model.save_pretrained(folder / f"{name}-adapter")
    merge_checkpoint(folders["base"], folder / f"{name}-adapter", folders["files"])
    model.merge_and_unload().save_pretrained(folders["memory"])
    tokenizer.save_pretrained(folders["memory"])
    here["merged"] = _logprobs(_load(folders["files"]), prompts)
    if name == "nf4":
        folders["split"] = folder / f"{name}-split"
        split_groups(_load(folders["files"]), 32).save_pretrained(folders["split"])
        tokenizer.save_pretrained(folders["split"])
    return folders, here, prompts


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """All formats, asked in one process: vLLM takes long to be imported."""
    folder = tmp_path_factory.mktemp("served")
    made = {name: _folders(name, folder) for name in FORMATS}
    prompts = made["nf4"][2]
    models = {f"{name} {kind}": path for name, (folders, *_) in made.items() for kind, path in folders.items()}
    answers = _ask(models, prompts, folder)
    failed = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    assert not failed, failed
    flat = {name: [value for row in answer["logprobs"] for value in row] for name, answer in answers.items()}
    found = {
        name: Served(
            *(flat[f"{name} {kind}"] for kind in ("base", "files", "memory")),
            flat.get(f"{name} split"),
            answers[f"{name} base"]["quantization"],
            here["base"],
            here["merged"],
        )
        for name, (_, here, _) in made.items()
    }
    print(_table(found))  # with -s, as `make serving` has it
    return found


def _changes(found: Served) -> tuple[list[float], list[float]]:
    """What merging changed, in vLLM and in transformers, by token."""
    there = [merged - base for merged, base in zip(found.files, found.base, strict=True)]
    return there, [merged - base for merged, base in zip(found.merged_here, found.base_here, strict=True)]


def _table(served: dict[str, Served]) -> str:
    """Perplexities here and there, and how the changes of log-probabilities agree."""
    rows = ["", "| format | transformers | vLLM | error of the change | correlation |", "|---|---|---|---|---|"]
    for name, found in served.items():
        there, here = _changes(found)
        error = sqrt(sum((a - b) ** 2 for a, b in zip(there, here, strict=True)) / sum(b * b for b in here))
        cells = [
            f"{exp(-mean(base)):.2f} -> {exp(-mean(merged)):.2f}"
            for base, merged in ((found.base_here, found.merged_here), (found.base, found.files))
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * error:.1f} % | {correlation(there, here):.5f} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_learnt_is_served(name, served):
    found = served[name]
    there, here = _changes(found)
    assert found.quantization is not None
    assert correlation(there, here) > FORMATS[name][1]
    assert sum(there) > 0  # the prompts are of the kind that was learnt


@pytest.mark.parametrize("name", FORMATS)
def test_merged_on_files_or_in_memory_is_served_alike(name, served):
    assert served[name].files == served[name].memory


def test_finer_groups_serve_the_same(served):
    assert served["nf4"].split == served["nf4"].files
