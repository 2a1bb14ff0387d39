"""Two processes sum what they see and select the same, as one process with all the data does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import DENSE, NF4, byte_tokenizer
from support.calibration import TEXTS, padded_batches
from torch import distributed, multiprocessing

from peft_sgrq import SGRQConfig, calibrate

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "texts": {"data": TEXTS},
    "diag": {"data": TEXTS, "criterion": "diag"},
    "gradient": {"data": TEXTS, "criterion": "gradient"},
    "fewer texts than processes": {"data": TEXTS[:1]},
    "batches of their own": {"data": None},
    "empty": {"data": []},
}


def run(case: str, directory: Path, rank: int | None) -> Any:
    settings = {"criterion": "obs", **CASES[case]}
    base = NF4 if case == "texts" else DENSE
    config = SGRQConfig(ratio="knee", group_size=16, task_type="CAUSAL_LM")
    data = settings["data"]
    if data is None:  # one of the processes has more than the other
        batches = padded_batches(3)
        data = batches if rank is None else batches[:1] if rank == 0 else batches[1:]
    try:
        saliency = calibrate(
            base.load(directory), config, data, byte_tokenizer(), criterion=settings["criterion"], progress=False
        )
    except ValueError as error:
        return str(error)
    return saliency.scores, config.selection, saliency.tokens


def process(rank: int, directory: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", init_method=f"file://{results}/meet", rank=rank, world_size=2)
    found = {case: run(case, Path(directory), rank) for case in CASES}
    torch.save(found, f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = tmp_path_factory.mktemp("processes")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["peft_sgrq", "trl"])  # imported once, not twice
    multiprocessing.start_processes(process, (str(llama_dir), str(results)), nprocs=2, start_method="forkserver")
    return [torch.load(results / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "empty"])
def test_two_processes_find_what_one_finds(case, found, llama_dir: Path):
    scores, selection, tokens = run(case, llama_dir, None)
    for other_scores, other_selection, other_tokens in (found[0][case], found[1][case]):
        assert other_tokens == tokens and list(other_scores) == list(scores)
        for name, values in scores.items():
            torch.testing.assert_close(other_scores[name], values, rtol=1e-3, atol=0)
        assert other_selection == selection


@pytest.mark.parametrize("case", [case for case in CASES if case != "empty"])
def test_all_processes_get_the_same_bits(case, found):
    (first, first_selection, _), (second, second_selection, _) = found[0][case], found[1][case]
    assert all(torch.equal(first[name], second[name]) for name in first) and first_selection == second_selection


def test_all_processes_refuse_empty_data(found):
    assert "calibration data is empty" in found[0]["empty"]
    assert found[0]["empty"] == found[1]["empty"]
