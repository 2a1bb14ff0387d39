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
from peft_sgrq.passes.processes import sum_over_processes, together

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


def random_start() -> SGRQConfig:
    return SGRQConfig(init_weights=False, ratio=1.0, group_size=16, task_type="CAUSAL_LM")


RECOVERIES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "preserving": {"preservation": 0.1},
    "preserving all alike": {"preservation": 0.1, "importance": "magnitude", "epochs": 1},
    "distilled": {"epochs": 0, "distill_steps": 4},
    "batches of their own": {"preservation": 0.1, "distill_steps": 3},
}


def own_batches(rank: int | None) -> list[dict[str, torch.Tensor]]:
    """One of the processes has a batch more than the other; one process has the first of both in one."""
    first, second, third = padded_batches(3)
    joined = {key: torch.cat([first[key], second[key]]) for key in first}
    return [joined, third] if rank is None else [first] if rank == 0 else [second, third]


def recover_case(case: str, directory: Path, batch_size: int, rank: int | None, **options: Any) -> Any:
    if case == "batches of their own":
        options["data"] = own_batches(rank)
    found = recovered(directory, batch_size=batch_size, **{"epochs": 2, **RECOVERIES[case], **options})
    deltas = {name: value.detach() for name, value in found.model.named_parameters() if "sgrq_delta" in name}
    errors = [(block.name, block.before, block.after) for block in found.blocks]
    distilled = found.distillation and (found.distillation.before, found.distillation.after, found.distillation.steps)
    return deltas, errors, distilled


def resumed(directory: Path, file: Path, rank: int) -> Any:
    """A recovery with a file, and another that finds all blocks in it."""
    options = {"preservation": 0.1, "progress_file": file if rank == 0 else None}
    return [recover_case("blocks", directory, 2, rank, **options) for _ in range(2)]


def refused(directory: Path, **options: Any) -> str:
    try:
        recovered(directory, **options)
    except ValueError as error:
        return str(error)
    return ""


def unread(rank: int, file: Path) -> str:
    try:
        with together():
            if rank == 0:
                file.read_bytes()
    except OSError as error:
        return str(error)
    return ""


def process(rank: int, directory: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", init_method=f"file://{results}/meet", rank=rank, world_size=2)
    found = {case: run(case, Path(directory), rank) for case in CASES}
    found |= {f"recover {case}": recover_case(case, Path(directory), 2, rank) for case in RECOVERIES}
    found["random start"] = recover_case("blocks", Path(directory), 2, rank, config=random_start(), epochs=1)
    found["resumed"] = resumed(Path(directory), Path(results, "new", "progress"), rank)
    found["refused"] = refused(Path(directory), data=sequences(1))
    another = {"epochs": 2, "preservation": 0.1, "seed": 1, "progress_file": Path(results, "new", "progress")}
    found["another's"] = refused(Path(directory), **another)
    found["unread"] = unread(rank, Path(results, "not there"))
    found["transposed"] = torch.arange(6.0).view(3, 2).t() if rank else torch.arange(6.0).view(2, 3)
    sum_over_processes([found["transposed"]])
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
    deltas, errors, distilled = recover_case(case, llama_dir, 4, None)
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


def test_what_the_first_process_cannot_read_stops_all(found):
    assert "not there" in found[0]["unread"]
    assert found[0]["unread"] == found[1]["unread"]


def test_all_processes_refuse_to_recover_on_too_little_data(found):
    assert "fewer sequences than there are processes (2)" in found[0]["refused"]
    assert found[0]["refused"] == found[1]["refused"]


def test_all_processes_refuse_what_the_first_finds_in_its_file(found):
    assert "is of a recovery with seed=0, expected 1" in found[0]["another's"]
    assert found[0]["another's"] == found[1]["another's"]


def test_deltas_that_begin_at_random_end_alike_on_all_processes(found):
    (first, *first_rest), (second, *second_rest) = (results["random start"] for results in found)
    assert all(torch.equal(first[name], second[name]) for name in first) and first_rest == second_rest


def test_tensors_are_summed_by_place_whatever_their_layout(found):
    expected = torch.arange(6.0).view(2, 3) + torch.arange(6.0).view(3, 2).t()
    assert all(torch.equal(results["transposed"], expected) for results in found)
