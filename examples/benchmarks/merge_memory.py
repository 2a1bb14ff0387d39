"""Memory and time of merging on files: a made-up nf4 checkpoint in shards, merged in a process that watches itself.

    python examples/benchmarks/merge_memory.py --gigabytes 4

Prints the size of the checkpoint, the seconds of the merge beside those of copying the files, and the most memory the
process had besides the files it had mapped (what it would need on a machine without room for them).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.checkpoint import plan, verify  # noqa: F401  (imported before memory is measured)
from peft_sgrq.layer.masks import pack_mask

ROWS, COLUMNS, BLOCK, LAYERS_A_SHARD = 8192, 4096, 64, 24


def layer(name: str, nested: bool) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=nested
    )
    tensors = {f"{name}.weight": packed}
    return tensors | {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def make(base: Path, adapter: Path, gigabytes: float, nested: bool) -> None:
    """Writes shards of equal layers, which take long to quantize, and an adapter on 40 % of their groups."""
    base.mkdir()
    adapter.mkdir()
    count = max(1, round(gigabytes * 1e9 / (ROWS * COLUMNS // 2) / LAYERS_A_SHARD))
    made = {key.removeprefix("0"): value for key, value in layer("0", nested).items()}
    names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    where, deltas = {}, {}
    groups = torch.arange(0, COLUMNS // BLOCK, 5).repeat(2).unique()
    for index, file in enumerate(names):
        part = {}
        for number in range(LAYERS_A_SHARD):
            name = f"layers.{index * LAYERS_A_SHARD + number}.proj"
            part |= {name + key: value.clone() for key, value in made.items()}
            prefix = f"base_model.model.{name}.sgrq_delta"
            deltas[f"{prefix}.weight"] = torch.randn(ROWS, len(groups)) * 0.01
            deltas[f"{prefix}.selection"] = pack_mask(groups, COLUMNS // BLOCK)
        where |= dict.fromkeys(part, file)
        save_file(part, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (base / "config.json").write_text("{}")
    save_file(deltas, adapter / "adapter_model.safetensors")
    SGRQConfig(target_modules=["proj"]).save_pretrained(str(adapter))


class Watch:
    """The most anonymous memory of this process while it is open, sampled."""

    def __enter__(self) -> Watch:
        self.start = self.most = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._seconds = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._seconds
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self.now())

    @staticmethod
    def now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--nested", action="store_true")
    parser.add_argument("--directory", help="where to work; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        base, adapter, out = (Path(scratch) / name for name in ("base", "adapter", "out"))
        # In another process, so that this one has not had the memory of making them.
        maker = multiprocessing.get_context("spawn").Process(
            target=make, args=(base, adapter, args.gigabytes, args.nested)
        )
        maker.start()
        maker.join()
        os.sync()
        size = sum(path.stat().st_size for path in base.iterdir()) / 1e9
        with Watch() as copying:
            shutil.copytree(base, Path(scratch) / "copy")
            os.sync()  # as the merge does with each file it writes
        shutil.rmtree(Path(scratch) / "copy")
        with Watch() as merging:
            report = merge_checkpoint(base, adapter, out)
        with Watch() as verifying:
            assert verify_checkpoint(base, adapter, out).ok
        adapter_size = (adapter / "adapter_model.safetensors").stat().st_size / 1e6
    print(f"checkpoint {size:.2f} GB, adapter {adapter_size:.0f} MB, {report.layers} layers")
    print(f"copying the files {copying.seconds:.1f} s")
    print(f"merging {merging.seconds:.1f} s, {merging.most - merging.start:.0f} MB more memory at its most")
    print(f"verifying {verifying.seconds:.1f} s, {verifying.most - verifying.start:.0f} MB more")


if __name__ == "__main__":
    main()
