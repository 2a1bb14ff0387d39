"""Training by several processes on one machine: what each does, and what comes out of it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# Imported once, by the process the others are forked from.
IMPORTS = [
    "bitsandbytes",
    "datasets",
    "peft_sgrq",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
]
TIMEOUT = timedelta(seconds=60)  # where one process has failed, the others wait no longer


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        engine (`str`): ddp, fsdp2, zero2 or zero3; what a single process does in its place is plain training.
        base (`str`): nf4, nf4-nested, int8 or dense.
        method (`str`): sgrq or lora.
        trainer (`str`): sft or dpo.
        dtype (`str`): In which the base computes.
        storage (`str`): In which bitsandbytes keeps 4-bit codes; FSDP2 shards what is stored in floating point.
        arguments (`dict`): Of the trainer.
        engine_arguments (`dict`): Of the engine.
        config (`dict`): Of the adapter.
        resume_at (`int` or `None`): The step at which training is stopped, saved, and gone on with by a new trainer.
        load (`Callable` or `None`): What loads the base from the model's folder, if it is none of these.
    """

    engine: str
    base: str
    method: str = "sgrq"
    trainer: str = "sft"
    dtype: str = "float32"
    storage: str = "uint8"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_at: int | None = None
    load: Callable[[Path | str], Any] | None = None


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def load_base(case: Case, directory: Path | str) -> Any:
    """The model of a case in eval mode, quantized while loading."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

    if case.load is not None:
        return case.load(directory)
    settings: dict[str, Any] = {"dtype": getattr(torch, case.dtype)}
    if case.base == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif case.base.startswith("nf4"):
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=case.base == "nf4-nested",
            bnb_4bit_compute_dtype=getattr(torch, case.dtype),
            bnb_4bit_quant_storage=getattr(torch, case.storage),
        )
    model = AutoModelForCausalLM.from_pretrained(directory, **settings)
    disable_cpu_packing(model)
    return model.eval()


def _engine_arguments(case: Case) -> dict[str, Any]:
    if case.engine == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": True, "fsdp_config": {**wrapped, **case.engine_arguments}}
    if case.engine.startswith("zero"):
        zero = {"stage": int(case.engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        config = {
            **dict.fromkeys((*sizes, "gradient_clipping"), "auto"),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **case.engine_arguments,
        }
        return {"deepspeed": config}
    return dict(case.engine_arguments)


def make_trainer(case: Case, directory: Path | str, out: Path | str, processes: int = 1) -> Any:
    """The trainer of a case; the batch of 4 is shared among the processes.

    Args:
        case (`Case`): What to train.
        directory (`Path` or `str`): A Llama in float32, with its tokenizer.
        out (`Path` or `str`): Where the trainer writes.
        processes (`int`): How many there are; with one, there is no engine.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from peft_sgrq import SGRQConfig

    torch.manual_seed(0)
    arguments = {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "per_device_train_batch_size": 4 // processes,
        "max_steps": 3,
        "max_length": 32,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **(_engine_arguments(case) if processes > 1 else {}),
        **case.arguments,
    }
    if case.resume_at:
        arguments |= {"save_strategy": "steps", "save_steps": case.resume_at}
    if case.method == "lora":
        adapter: Any = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", **case.config)
    else:
        adapter = SGRQConfig(task_type="CAUSAL_LM", **case.config)
    texts = [f"The sum of {i} and {i + 3} is {2 * i + 3}. " * (1 + i % 2) for i in range(48)]  # of unequal length
    tokenizer = AutoTokenizer.from_pretrained(directory)
    shared = {"processing_class": tokenizer, "peft_config": adapter}
    if case.trainer == "dpo":
        rows = {"prompt": [text[:12] for text in texts], "chosen": [text[12:] for text in texts]}
        rows["rejected"] = [f" a lot, {i}." for i in range(48)]
        data = Dataset.from_dict(rows)
        return DPOTrainer(load_base(case, directory), args=DPOConfig(**arguments), train_dataset=data, **shared)
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(load_base(case, directory), args=SFTConfig(**arguments), train_dataset=data, **shared)


def adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters of a model by name, whole on every process."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        if not parameter.requires_grad:
            continue
        value = parameter.detach()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        elif hasattr(value, "full_tensor"):
            value = value.full_tensor()
        found[name] = value.clone()
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a fixed batch, in eval mode, float32 `[2, 16, vocabulary]`."""
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    model.eval()  # DeepSpeed's returns nothing
    return model(input_ids=ids).logits.float()


def train(case: Case, directory: Path | str, out: Path, processes: int = 1, observe: Any = None) -> dict[str, Any]:
    """Trains a case, and saves its adapter in `out` as trainers do.

    Returns:
        The losses, the adapter's parameters (`parameters`), the logits after training under the engine (`logits`), the
        class an engine has wrapped the model in (`wrapped`), the dtypes of the optimizer's states (`dtypes`), and with
        `resume_at` what came of going on from there (`resumed`).
    """
    trainer = make_trainer(case, directory, out, processes)
    if observe is not None:
        observe(trainer)
    trainer.train()
    found = _results(trainer)
    trainer.save_model(str(out))
    if case.resume_at:
        _wait()
        resumed = make_trainer(case, directory, out / "resumed", processes)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{case.resume_at}"))
        found["resumed"] = _results(resumed)
    return found


def _results(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": adapter_parameters(trainer.model),
        "logits": logits(trainer.model_wrapped),
        "wrapped": type(trainer.model_wrapped).__name__,
        "dtypes": sorted({str(value.dtype) for value in states if value.numel() > 1}),
    }


def _wait() -> None:
    if distributed.is_initialized():
        distributed.barrier()


# Processes


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
        _wait()
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
        with _fsdp_on_cpus() if case.engine == "fsdp2" else _nothing():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _start_deepspeed() -> None:
    import deepspeed
    import deepspeed.comm.torch as scaled_weight

    scaled_weight.build_shm_op = lambda: None  # an extension of shared memory that takes minutes to compile; gloo does
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


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
