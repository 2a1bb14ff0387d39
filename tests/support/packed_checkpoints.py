"""Real checkpoints of a small Llama in GPTQ, AWQ and AutoRound, quantized by the libraries themselves.

Each library quantizes all of its checkpoints in one process of its own: their quantizers start threads and patch
transformers, which is nothing for the process of the tests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_GPTQMODEL = """
import json, sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
for directory, base, options in json.load(open(sys.argv[1])):
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 256, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(8)
    ]
    model = GPTQModel.load(base, QuantizeConfig(offload_to_disk=False, **options), device="cpu")
    model.quantize(data, batch_size=1)
    model.save(directory)
"""
_AUTOROUND = """
import json, pathlib, sys, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory, base, options in json.load(open(sys.argv[1])):
    torch.manual_seed(0)
    data = list(torch.randint(3, 256, (8, 1, 64)))
    packing = options.pop("packing")
    quantizer = AutoRound(
        AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), iters=0, seqlen=64,
        nsamples=8, dataset=data, device_map="cpu", enable_torch_compile=False, **options,
    )
    quantizer.quantize_and_save(directory + "-made", format=packing)
    next(pathlib.Path(directory + "-made").iterdir()).rename(directory)
"""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, how it is made and how its own loader reads it.

    Attributes:
        name (`str`): For test ids and `pytest -k`.
        library (`str`): The package that makes it; tests skip by its name where it is not installed.
        options (`dict`): Arguments of the library's quantizer.
        config (`str`): The expression of the quantization config that loads the kernel which can be trained through.
        dtype (`torch.dtype`): What it is loaded in.
        ragged (`bool`): Whether the model has a layer whose last group is incomplete.
    """

    name: str
    library: str
    options: dict[str, Any]
    config: str
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False

    def require(self) -> None:
        """Skips the test, by the name of the library, where it is not installed."""
        for library in {self.library, "optimum" if self.library == "gptqmodel" else self.library}:
            if find_spec(library) is None:
                pytest.skip(f"{library} is not installed, which the checkpoint {self.name} needs")

    @property
    def reload(self) -> str:
        """Python code that sets `model` from `directory` by the format's own loader."""
        return (
            "from transformers import AutoModelForCausalLM, AutoRoundConfig, AwqConfig, GPTQConfig\n"
            f"model = AutoModelForCausalLM.from_pretrained(directory, dtype={self.dtype}, "
            f"quantization_config={self.config})"
        )

    def load(self, directory: Path) -> Any:
        """The model in eval mode."""
        names: dict[str, Any] = {"directory": str(directory), "torch": torch}
        exec(self.reload, names)
        return names["model"].eval()


def _gptq(name: str, bits: int, group_size: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Checkpoint:
    ragged = options.pop("ragged", False)
    settings = {"bits": bits, "group_size": group_size, "desc_act": False, "sym": True, **options}
    return Checkpoint(name, "gptqmodel", settings, f'GPTQConfig(bits={bits}, backend="torch")', dtype, ragged)


def _awq(name: str, dtype: torch.dtype) -> Checkpoint:
    settings = {"bits": 4, "group_size": 64, "sym": False, "method": "awq", "format": "gemm"}
    return Checkpoint(name, "gptqmodel", settings, 'AwqConfig(bits=4, backend="torch_awq")', dtype)


def _autoround(
    name: str, bits: int, packing: str, dtype: torch.dtype = torch.bfloat16, sym: bool = True
) -> Checkpoint:
    settings = {"bits": bits, "group_size": 64, "sym": sym, "packing": packing}
    return Checkpoint(name, "auto_round", settings, 'AutoRoundConfig(backend="torch")', dtype)


CHECKPOINTS = [
    _gptq("gptq-4bit", 4, 64),
    _gptq("gptq-4bit-float16", 4, 64, torch.float16),
    _gptq("gptq-4bit-asym-v2", 4, 64, sym=False, format="gptq_v2"),
    _gptq("gptq-4bit-act-order-ragged", 4, 64, desc_act=True, ragged=True),
    _gptq("gptq-2bit-asym", 2, 64, sym=False),
    _gptq("gptq-3bit", 3, 64),
    _gptq("gptq-8bit-row", 8, -1, act_group_aware=False),
    _awq("awq-4bit", torch.bfloat16),
    _awq("awq-4bit-float16", torch.float16),
    _autoround("autoround-4bit", 4, "auto_round"),
    _autoround("autoround-3bit", 3, "auto_round"),
    _autoround("autoround-8bit-float16", 8, "auto_round:auto_gptq", torch.float16),
    _autoround("autoround-4bit-asym", 4, "auto_round:auto_awq", torch.float16, sym=False),
]


def _save_one_block(base: Path, directory: Path, intermediate_size: int) -> Path:
    """Saves a random model as `base` is, but of one block: quantizing takes a second for every two layers."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers, config.intermediate_size = 1, intermediate_size
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


def in_dtype(directory: Path, dtype: torch.dtype, out: Path) -> Path:
    """The checkpoint as it would be published in a dtype: what is not quantized is cast to it."""
    shutil.copytree(directory, out)
    fields = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {
        name: tensor if name.endswith(fields) else tensor.to(dtype)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    return out


def make(checkpoints: list[Checkpoint], base: Path, scratch: Path) -> dict[str, Path]:
    """Quantizes the checkpoints of installed libraries, and returns their directories by name.

    Args:
        checkpoints (`list[Checkpoint]`): What to make; those of absent libraries are left out.
        base (`Path`): A dense model; one of one block is made in its image.
        scratch (`Path`): Where they go.
    """
    even = _save_one_block(base, scratch / "even", 512)
    ragged = _save_one_block(base, scratch / "ragged", 480)  # seven groups of 64 and one of 32
    found: dict[str, Path] = {}
    running = []  # side by side: another process of the tests may be waiting
    for library, code in (("gptqmodel", _GPTQMODEL), ("auto_round", _AUTOROUND)):
        wanted = [checkpoint for checkpoint in checkpoints if checkpoint.library == library]
        if not wanted or find_spec(library) is None:
            continue
        made: dict[str, Path] = {}  # checkpoints that differ in how they are loaded are made once
        plan = []
        for checkpoint in wanted:
            key = json.dumps([checkpoint.options, checkpoint.ragged])
            if key not in made:
                made[key] = scratch / checkpoint.name
                plan.append((str(made[key]), str(ragged if checkpoint.ragged else even), checkpoint.options))
            found[checkpoint.name] = made[key]
        (scratch / f"{library}.json").write_text(json.dumps(plan))
        with open(scratch / f"{library}.log", "w") as log:
            command = [sys.executable, "-c", code, str(scratch / f"{library}.json")]
            running.append((subprocess.Popen(command, cwd=scratch, stdout=log, stderr=log), Path(log.name)))
    for process, said in running:
        assert process.wait(900) == 0, said.read_text()[-3000:]
    return found
