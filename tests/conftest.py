"""Small real models in every supported format, made on the spot; nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU; read when triton is imported
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores GPTQModel loads no model otherwise

import gc
import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from support.asked_for import asked_for
from support.bases import BASES, Base, save_small_llama, save_tiny_gpt2, save_tiny_llama
from support.packed_checkpoints import CHECKPOINTS, make
from support.quantized_checkpoints import DENSE_FILES, NF4_NESTED_FILES, base_and_adapter

settings.register_profile("seeded", derandomize=True, deadline=None)  # a failure is one for everybody
settings.load_profile("seeded")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not slow"` files that are slow as a whole are not even imported: theirs are the heavy libraries."""
    if config.option.markexpr != "not slow" or not collection_path.match("test_*.py"):
        return None
    return True if _is_slow(collection_path) else None


def _is_slow(path: Path) -> bool:
    return "\npytestmark = pytest.mark.slow\n" in path.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left with one at the end, and short ones fill the gaps.

    The first makes the packed checkpoints; others that want them come later, and need not wait for them.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def place(path: Path) -> int:
        if path.name == "test_packed_models.py":
            return 0
        if not _is_slow(path):
            return 3
        return 2 if any("packed_checkpoints" in getattr(item, "fixturenames", ()) for item in files[path]) else 1

    items[:] = [item for path in sorted(files, key=place) for item in files[path]]


def pytest_collection_finish() -> None:
    """Spares the garbage collector the libraries, which stay: looking through them took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def eager():
    """Runs what libraries compile (GPTQModel its dequantization) as it is written: a compilation takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


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
    """Each base: nf4 and fp4, nested or not, int8 and dense, in float32 or bfloat16."""
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


@pytest.fixture(scope="session")
def packed_checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the GPTQ, AWQ and AutoRound checkpoints that the selected tests ask for, by name.

    Not to be written to: they are made once for all processes of pytest-xdist, as quantizing takes long.
    """
    names = {value.name for name in ("checkpoint", "split_kind") for value in asked_for(request, name)}
    root = tmp_path_factory.getbasetemp()
    root = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    scratch, made = root / "packed", root / "packed.json"
    with FileLock(root / "packed.lock"):
        if not made.exists():
            scratch.mkdir()
            base = save_small_llama(scratch / "base")
            found = make([checkpoint for checkpoint in CHECKPOINTS if checkpoint.name in names], base, scratch)
            made.write_text(json.dumps({name: str(path) for name, path in found.items()}))
    return {name: Path(path) for name, path in json.loads(made.read_text()).items()}
