"""Two processes sum what they see; they select, and recover, what one process with all the data does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import DENSE, NF4, byte_tokenizer
from support.calibration import TEXTS, padded_batches
from support.rounded_models import recovered, sequences
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


RECOVERIES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "preserving": {"preservation": 0.1},
    "preserving by inputs": {"preservation": 0.1, "importance": "obs", "epochs": 1},
    "distilled": {"epochs": 0, "distill_steps": 4},
}


def recover_case(case: str, directory: Path, batch_size: int, **options: Any) -> Any:
    found = recovered(directory, batch_size=batch_size, **{"epochs": 2, **RECOVERIES[case], **options})
    deltas = {name: value.detach() for name, value in found.model.named_parameters() if "sgrq_delta" in name}
    errors = [(block.name, block.before, block.after) for block in found.blocks]
    distilled = found.distillation and (found.distillation.before, found.distillation.after, found.distillation.steps)
    return deltas, errors, distilled


def resumed(directory: Path, file: Path) -> Any:
    """A recovery whose second block finds the first in the file."""
    whole = recover_case("blocks", directory, 2, progress_file=file)
    return whole, recover_case("blocks", directory, 2, progress_file=file)


def refused(directory: Path) -> str:
    try:
        recovered(directory, data=sequences(1))
    except ValueError as error:
        return str(error)
    return ""


def process(rank: int, directory: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", init_method=f"file://{results}/meet", rank=rank, world_size=2)
    found = {case: run(case, Path(directory), rank) for case in CASES}
    found |= {f"recover {case}": recover_case(case, Path(directory), 2) for case in RECOVERIES}
    found["resumed"] = resumed(Path(directory), Path(results, "progress"))
    found["refused"] = refused(Path(directory))
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


@pytest.mark.parametrize("case", RECOVERIES)
def test_two_processes_recover_what_one_does_with_batches_twice_as_large(case, found, llama_dir: Path):
    deltas, errors, distilled = recover_case(case, llama_dir, 4)
    for other_deltas, other_errors, other_distilled in (found[0][f"recover {case}"], found[1][f"recover {case}"]):
        for name, values in deltas.items():
            # Adam divides by the size of gradients, so that small ones are amplified.
            assert (other_deltas[name] - values).norm() < 1e-2 * values.norm()
        assert [name for name, *_ in other_errors] == [name for name, *_ in errors]
        for other, one in zip(other_errors, errors, strict=True):
            assert other[1:] == pytest.approx(one[1:], rel=1e-3)
        if distilled:
            before, after, steps = distilled
            assert other_distilled[:2] == pytest.approx((before, after), rel=1e-3) and after < before
            assert other_distilled[2] == pytest.approx(steps, rel=1e-3)


@pytest.mark.parametrize("case", RECOVERIES)
def test_all_processes_recover_the_same_bits(case, found):
    (first, *first_rest), (second, *second_rest) = found[0][f"recover {case}"], found[1][f"recover {case}"]
    assert all(torch.equal(first[name], second[name]) for name in first) and first_rest == second_rest


def test_a_recovery_goes_on_from_its_file_in_all_processes(found):
    for results in found:
        (whole, errors, _), (again, same_errors, _) = results["resumed"]
        assert errors == same_errors and all(torch.equal(again[name], whole[name]) for name in whole)


def test_all_processes_refuse_to_recover_on_too_little_data(found):
    assert "fewer sequences than there are processes (2)" in found[0]["refused"]
    assert found[0]["refused"] == found[1]["refused"]
