"""Start-up, loading, saving and merging on a model of the shape of Llama 3 8B, with random codes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from examples.benchmarks.methods import linear_4bit
from peft_sgrq import SGRQConfig

HIDDEN, INTERMEDIATE, KEY_VALUE, BLOCKS = 4096, 14336, 1024, 32


class Block(nn.Module):
    """The linear layers of one block."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.q_proj = linear_4bit(HIDDEN, HIDDEN, device)
        self.k_proj = linear_4bit(KEY_VALUE, HIDDEN, device)
        self.v_proj = linear_4bit(KEY_VALUE, HIDDEN, device)
        self.o_proj = linear_4bit(HIDDEN, HIDDEN, device)
        self.gate_proj = linear_4bit(INTERMEDIATE, HIDDEN, device)
        self.up_proj = linear_4bit(INTERMEDIATE, HIDDEN, device)
        self.down_proj = linear_4bit(HIDDEN, INTERMEDIATE, device)


def make(blocks: int, device: torch.device) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(Block(device) for _ in range(blocks))
    return model


class Watch:
    """Seconds and peak memory (of the process, or of the GPU) of some work, above what was there before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def __call__(self, job: Callable[[], Any]) -> dict[str, float]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before, done, peak = self.memory(), threading.Event(), [0]

        def look() -> None:
            while not done.wait(0.01):
                peak[0] = max(peak[0], self.memory())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        start, processor = time.perf_counter(), time.process_time()
        job()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        end = time.perf_counter()
        values = {"seconds": end - start, "CPU seconds": time.process_time() - processor}
        done.set()
        watcher.join()
        return {**values, "peak": max(peak[0], self.memory()) - before}


def measure_startup(device: torch.device, blocks: int = BLOCKS) -> dict[str, Any]:
    """Makes the model, adapts it, saves, loads and merges: what each takes, with SGRQ and with LoRA.

    Args:
        device (`torch.device`): Where.
        blocks (`int`): How many of the 32 blocks.

    Returns:
        method -> step -> `seconds`, `CPU seconds`, `peak` (bytes above what was there), and the size of the model.
    """
    watch = Watch(device)
    model = make(blocks, device)
    size = sum(tensor.nbytes for tensor in model.parameters())
    size += sum(m.weight.quant_state.absmax.nbytes for m in model.modules() if hasattr(m, "weight"))
    weights = sum(2 * p.numel() for p in model.parameters())
    result: dict[str, Any] = {"model": {"bytes": size, "weights": weights, "blocks": blocks}}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = {
        "SGRQ 0.4": lambda: SGRQConfig(target_modules=targets, ratio=0.4),
        "LoRA r=16": lambda: LoraConfig(r=16, target_modules=targets),
    }
    for name, config in configs.items():
        steps: dict[str, Any] = {}
        adapted: list[Any] = []
        with tempfile.TemporaryDirectory() as directory:
            steps["get_peft_model"] = watch(lambda c=config, a=adapted: a.append(get_peft_model(model, c())))
            peft_model = adapted[0]
            steps["save_pretrained"] = watch(lambda p=peft_model, d=directory: p.save_pretrained(d))
            steps["load_adapter"] = watch(lambda p=peft_model, d=directory: p.load_adapter(d, "second"))
            peft_model.delete_adapter("second")
            if name.startswith("SGRQ"):  # LoRA would quantize all weights again, and the base would not be the same
                steps["merge_adapter"] = watch(peft_model.merge_adapter)
                steps["unmerge_adapter"] = watch(peft_model.unmerge_adapter)
                steps["merge_and_unload"] = watch(peft_model.merge_and_unload)
            else:
                peft_model.unload()
        result[name] = steps
        del adapted, peft_model
    return result


def measure_import(repeats: int = 5) -> dict[str, float]:
    """Seconds that `import peft_sgrq` adds to `import peft`, the median of some fresh processes."""
    program = "import time; import peft; a = time.process_time(); import peft_sgrq; print(time.process_time() - a)"
    alone = {**os.environ, "PEFT_SGRQ_AUTOLOAD": "0"}  # importing peft would import it as well
    found = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=alone
            ).stdout
        )
        for _ in range(repeats)
    ]
    return {"seconds": sorted(found)[repeats // 2]}
