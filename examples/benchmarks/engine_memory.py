"""Memory for weights and training states by engine, calculated from the shapes of a model: nothing is measured.

    python -m examples.benchmarks.engine_memory --page docs/distributed.md

For nf4 in blocks of 64 with nested scales, embeddings and output head in bfloat16, AdamW, and as many deltas as
scales. Not in it: activations, what a library keeps for itself, and the weights an engine has gathered for the moment.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from examples.benchmarks.markdown_tables import put_between, table

START, END = "<!-- engines: memory -->", "<!-- /engines: memory -->"
GROUP = 64
NESTED = 1 + 4 / 256  # bytes of a nested scale: one, and a float32 for 256 of them


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama: width, of the feed-forward part, of keys and values together, layers, vocabulary."""

    name: str
    hidden: int
    inner: int
    keys: int
    layers: int
    vocabulary: int = 128256

    @property
    def quantized(self) -> int:
        """Weights in the layers that are quantized."""
        attention = 2 * self.hidden * self.hidden + 2 * self.keys * self.hidden
        return self.layers * (attention + 3 * self.inner * self.hidden)

    @property
    def embeddings(self) -> int:
        """Weights of embeddings and output head."""
        return 2 * self.vocabulary * self.hidden


MODELS = (Model("Llama 3.1 8B", 4096, 14336, 1024, 32), Model("Llama 3.1 70B", 8192, 28672, 1024, 80))
DEVICES = (2, 8)


def bytes_by_engine(model: Model, devices: int, ratio: float = 1.0) -> dict[str, float]:
    """Bytes on each device; a delta takes 4, its gradient 4, its two Adam states 8."""
    packed, scales = model.quantized / 2, model.quantized / GROUP * NESTED
    deltas = 4 * ratio * model.quantized / GROUP
    embeddings = 2 * model.embeddings
    return {
        "DDP": packed + scales + embeddings + 4 * deltas,
        # DeepSpeed keeps a float32 copy of what its optimizer owns.
        "DeepSpeed ZeRO-2": packed + scales + embeddings + deltas + 4 * deltas / devices,
        "FSDP2, codes in bytes": packed + scales + (embeddings + 4 * deltas) / devices,
        "FSDP2, codes in bfloat16": scales + (packed + embeddings + 4 * deltas) / devices,
        "DeepSpeed ZeRO-3": scales + (packed + embeddings + 5 * deltas) / devices,
    }


def memory_table() -> str:
    """GB by engine for each model and number of devices."""
    columns = [(model, devices) for model in MODELS for devices in DEVICES]
    rows = [["GB on each device", *(f"{model.name}, {devices} devices" for model, devices in columns)]]
    for engine in bytes_by_engine(MODELS[0], 1):
        cells = [f"{bytes_by_engine(model, devices)[engine] / 1e9:.1f}" for model, devices in columns]
        rows.append([engine, *cells])
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="the page to write the table into")
    args = parser.parse_args()
    print(memory_table())
    if args.page:
        args.page.write_text(put_between(args.page.read_text(), START, END, memory_table()))


if __name__ == "__main__":
    main()
