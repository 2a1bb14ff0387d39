"""What engines of distributed training do to the tensors of a model: shards, and weights that are elsewhere."""

from __future__ import annotations

import os

from torch import nn
from torch.distributed.tensor import DTensor

from peft_sgrq.formats.bnb_int8.weight import BnbInt8Weight
from peft_sgrq.formats.registry import is_quantized

# By name: the classes belong to engines that need not be there.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_DOCS = "https://huggingface.co/docs/bitsandbytes/fsdp_qlora"


def check_engine(model: nn.Module) -> None:
    """Refuses what the engine in use cannot train, before anything is changed.

    Args:
        model (`nn.Module`): The base model, not wrapped yet.

    Raises:
        ValueError: If an engine has wrapped the model already and would not know of the deltas, the model is sharded
            already (tensor parallelism, FSDP2), or is to be sharded by FSDP and cannot be.
    """
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            raise ValueError(
                f"The model is wrapped in {type(module).__name__} already ({name or 'as a whole'}), which would not "
                "average the gradients of deltas that are added now, and puts a name of its own into those of the "
                "layers, expected a model that is not wrapped yet; add the adapter to the model itself (`.module`), "
                "and wrap the result. The model was not changed."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor) and "sgrq_delta" not in name:
            raise ValueError(
                f"The weight {name!r} is sharded over {parameter.data.device_mesh.size()} devices (a DTensor, as "
                "transformers' `tp_plan` and FSDP2 make them), expected a whole one: scales belong to whole rows and "
                "groups; load the model without `tp_plan`, add the adapter before FSDP2 wraps the model, and use "
                "FSDP2 or DeepSpeed ZeRO-3 to split a model over devices. The model was not changed."
            )
    if not _flag("ACCELERATE_USE_FSDP"):
        return
    for name, module in model.named_modules():
        if BnbInt8Weight.matches(module):
            raise ValueError(
                f"Layer {name!r} is bitsandbytes int8, and FSDP takes the scales of such layers away (adapters of "
                "every kind fail there), expected 4-bit layers or dense ones; quantize in 4 bits with "
                f"`bnb_4bit_quant_storage` in floating point ({_DOCS}), or train by DDP or DeepSpeed ZeRO-2. The "
                "model was not changed."
            )
    if _flag("FSDP_CPU_RAM_EFFICIENT_LOADING") and not any(map(is_quantized, model.modules())):
        raise ValueError(
            "The model is not quantized and FSDP loads it on the first process only "
            "(`fsdp_cpu_ram_efficient_loading`), so the others cannot see which scales are salient or which base this "
            "is, expected the weights on each of them; set `fsdp_cpu_ram_efficient_loading: false`. The model was not "
            "changed."
        )


def check_whole(model: nn.Module) -> None:
    """Refuses to merge while an engine has the tensors of a model in shards.

    Raises:
        ValueError: If it has; the sentence says what to do instead.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            engine = "DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else "FSDP"
            raise ValueError(
                f"The adapter cannot be merged in place: {engine} has {name!r} in shards, expected whole tensors; "
                "save the adapter, and merge it on files (`peft-sgrq merge ADAPTER MERGED`) or in one process. "
                "Nothing was merged."
            )


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
