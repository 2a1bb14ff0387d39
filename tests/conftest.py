"""Small real models in every supported format, made on the spot; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU; read when triton is imported
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores GPTQModel loads no model otherwise

from pathlib import Path

import pytest
import torch
from support.bases import BASES, Base, save_tiny_gpt2, save_tiny_llama
from support.checkpoints import DENSE_FILES, NF4_NESTED_FILES, base_and_adapter


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama in float32, all in_features multiples of 64, with a tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-block GPT-2: its layers are transformers' Conv1D."""
    return save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=BASES, ids=lambda base: base.name)
def base(request: pytest.FixtureRequest) -> Base:
    """Every base: nf4 and fp4, nested or not, int8 and dense, in float32 and bfloat16."""
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    """A batch of token ids, int64 `[3, 20]`."""
    return torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def nested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a nested nf4 base and of an adapter with random deltas; not to be written to."""
    return base_and_adapter(NF4_NESTED_FILES, tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, not quantized, in float32."""
    return base_and_adapter(DENSE_FILES, tmp_path_factory.mktemp("dense"))
