"""Training by several processes on one machine that share its CPU."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from .ranks import Case, train, wait

# Imported once, by the process the others are forked from.
IMPORTS = [
    "bitsandbytes",
    "datasets",
    "peft_sgrq",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
]
TIMEOUT = timedelta(seconds=60)  # where one process has failed, the others wait no longer


def run(
    cases: Mapping[str, Case], directory: Path, results: Path, job: Callable[..., Any] = train, processes: int = 2
) -> list[dict[str, dict[str, Any]]]:
    """Trains cases one after the other by several processes that share the CPU.

    Args:
        cases (`dict[str, Case]`): By name.
        directory (`Path`): The model.
        results (`Path`): An empty folder; adapters are saved in `results / name`.
        job (`Callable`): What each process does, with the arguments of `train`.
        processes (`int`): How many.

    Returns:
        For each process what the job returned, by case; an exception as `{"error": traceback}`.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    arguments = (dict(cases), directory, results, job, processes)
    multiprocessing.start_processes(_process, arguments, nprocs=processes, start_method="forkserver")
    return [torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _process(
    rank: int, cases: dict[str, Case], directory: Path, results: Path, job: Callable[..., Any], processes: int
) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    distributed.init_process_group(
        "gloo", init_method=f"file://{results}/meet", rank=rank, world_size=processes, timeout=TIMEOUT
    )
    found = {}
    for name, case in cases.items():
        with _own_state(case):
            try:
                if case.engine.startswith("zero"):
                    _start_deepspeed()
                found[name] = job(case, directory, results / name, processes)
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        wait()
    torch.save(found, results / f"{rank}.pt")
    distributed.destroy_process_group()


@contextmanager
def _own_state(case: Case) -> Iterator[None]:
    """What accelerate and transformers keep for a process, new for a case."""
    from accelerate.state import AcceleratorState, GradientState

    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with _fsdp_on_cpus() if case.engine == "fsdp2" else nullcontext():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.comm.torch as torch_comm

    torch_comm.build_shm_op = lambda: None  # an extension of shared memory that takes minutes to compile; gloo does
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def _fsdp_on_cpus() -> Iterator[None]:
    """accelerate offers FSDP on accelerators only and trains by DDP where there is none; torch's runs on CPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            self.__class__._shared_state["distributed_type"] = DistributedType.FSDP
            from accelerate.state import PartialState

            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = original  # type: ignore[method-assign]
