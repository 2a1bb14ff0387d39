"""The methods compared, by name.

    lora-16           LoRA of that rank, its alpha the rank; merged as PEFT merges it, which quantizes again
    qalora-16         QA-LoRA, for GPTQ bases, the only ones PEFT has it for; PEFT cannot merge it
    ia3               IA3; PEFT cannot merge it into 4 bits
    sgrq-0.4          SGRQ at that ratio, columns by `obs`; `sgrq-knee` at the knee of each layer
    random-0.1, bottom-0.1   random columns, and those least salient by `obs`
    peqa, peqa-row    every scale, and every scale with the changes of a row tied: one number a row
    zeros             zero points alone

Options follow after colons: the schedule of the learning rate (`constant`, `linear`), Adam's first beta instead of 0.9
(`beta-0.5`), AdamW's weight decay instead of none (`decay-1`). For LoRA `original`: its changes are merged into the
weights before quantization, and those are quantized, instead of the base's once more. For SGRQ what is trained instead
of relative changes (`exp`, `absolute`), `zeros`, which trains zero points beside the scales, and `norms`, which trains
the normalization layers as well; for `sgrq-RATIO` also a criterion (`sgrq-0.1:gradient`), and `global`, one
threshold for all layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from comparison.variants import FORMS, reparametrize, tie_rows
from peft import IA3Config, LoraConfig, get_peft_model
from selection_bench import CONTROLS
from torch import nn

from peft_sgrq import SGRQConfig, SGRQLinear
from peft_sgrq.choices import CRITERIA, check_ratio

SCHEDULES = ("cosine", "linear", "constant")
CENTRES = {"lora": 1e-2, "qalora": 1e-2, "ia3": 1e-1, "sgrq": 1e-1}
_FLAGS = ("zeros", "norms")
DEFAULT_METHODS = (
    "lora-8", "lora-16", "lora-64", "qalora-16", "ia3", "sgrq-0.05", "sgrq-0.1", "sgrq-knee", "sgrq-0.4", "peqa",
    "peqa-row", "random-0.1", "bottom-0.1",
)  # fmt: skip


class Unavailable(Exception):
    """PEFT does not have the method for the base, or not for its format, or the format has no zero points."""


@dataclass(frozen=True)
class Method:
    """What is trained, and how.

    Attributes:
        name (`str`): As it is written on the command line and in the results.
        kind (`str`): "lora", "qalora", "ia3" or "sgrq".
        rank (`int`): Of LoRA and QA-LoRA.
        ratio (`float` or `"knee"`): Of SGRQ.
        criterion (`str`): Of SGRQ; a criterion of `calibrate`, or "bottom".
        everywhere (`bool`): One threshold for all layers instead of the same ratio in each.
        tied (`bool`): All changes of a row are the same.
        form (`str`): One of `FORMS`: what the trained numbers are.
        zeros, norms (`bool`): Train zero points, or the weights of normalization layers, as well.
        schedule (`str`): Of the learning rate, after the warm-up.
        original (`bool`): Merge LoRA into the weights before quantization, and quantize them.
        beta (`float`): Adam's first: how much of the mean gradient so far a step keeps.
        decay (`float`): AdamW's weight decay; each step takes that times the learning rate off the trained numbers.
    """

    name: str
    kind: str
    rank: int = 0
    ratio: float | str = 1.0
    criterion: str = "obs"
    everywhere: bool = False
    tied: bool = False
    form: str = "relative"
    zeros: bool = False
    norms: bool = False
    schedule: str = "cosine"
    original: bool = False
    beta: float = 0.9
    decay: float = 0.0

    @property
    def selects(self) -> bool:
        return self.kind == "sgrq" and self.ratio not in (0, 1)


def parse_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: If the name is not one of a method.
    """
    head, *options = name.split(":")
    word, _, number = head.partition("-")
    try:
        if word in ("lora", "qalora"):
            method = Method(name, word, rank=int(number))
            if method.rank < 1:
                raise ValueError
        elif word in ("sgrq", "random", "bottom"):
            ratio = "knee" if (word, number) == ("sgrq", "knee") else float(number)
            check_ratio(ratio)
            method = Method(name, "sgrq", ratio=ratio, criterion="obs" if word == "sgrq" else word)
        elif head in ("peqa", "peqa-row"):
            method = Method(name, "sgrq", tied=head == "peqa-row")
        elif head == "zeros":
            method = Method(name, "sgrq", ratio=0.0, zeros=True)
        elif head == "ia3":
            method = Method(name, head)
        else:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"The method {name!r} is not known, expected a name such as lora-16, qalora-16, ia3, sgrq-0.4, sgrq-knee, "
            "random-0.1, bottom-0.1, peqa, peqa-row or zeros."
        ) from None
    plain = method.selects and method.criterion == "obs"  # what another criterion can stand in for
    for option in options:
        if option in CRITERIA and plain:
            method = replace(method, criterion=option)
        elif option == "global" and method.selects and method.criterion not in CONTROLS:
            method = replace(method, everywhere=True)
        elif option == "original" and method.kind == "lora":
            method = replace(method, original=True)
        elif option in FORMS and method.kind == "sgrq":
            method = replace(method, form=option)
        elif option in SCHEDULES:
            method = replace(method, schedule=option)
        elif re.fullmatch(r"beta-0\.\d+", option):
            method = replace(method, beta=float(option.partition("-")[2]))
        elif re.fullmatch(r"decay-\d+(\.\d+)?", option):
            method = replace(method, decay=float(option.partition("-")[2]))
        elif option in _FLAGS and method.kind == "sgrq":
            method = replace(method, **{option: True})
        else:
            raise ValueError(
                f"The method {name!r} has the option {option!r}, expected one of {SCHEDULES}, beta-0.5, decay-1 or "
                f"the like; original for LoRA; one of {FORMS + _FLAGS} for SGRQ; a criterion or global for sgrq-RATIO."
            )
    return method


def adapt(model: Any, method: Method, targets: list[str], selection: Mapping[str, str] | None) -> Any:
    """The base with the untrained adapter of a method.

    Args:
        model (`PreTrainedModel`): The base, changed in place.
        method (`Method`): Which.
        targets (`list[str]`): Full names of the layers all methods adapt.
        selection (`Mapping[str, str]` or `None`): Layer -> mask of its selected groups, for SGRQ below ratio 1.0.

    Raises:
        Unavailable: If PEFT does not have the method for these layers, or they have no zero points.
    """
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    if method.kind == "sgrq":
        chosen = dict(selection) if selection is not None else None
        norms = [name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__]
        shared["modules_to_save"] = list(dict.fromkeys(norms)) if method.norms else None
        ratio = 0.0 if method.ratio == 0 else 1.0  # of what the selection has
        config = SGRQConfig(ratio=ratio, selection=chosen, zero_points=method.zeros, **shared)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            if not (method.zeros and "`zero_points` is True" in str(error)):
                raise
            raise Unavailable(str(error)) from error
        layers = [module for module in adapted.modules() if isinstance(module, SGRQLinear)]
        if method.tied:
            tie_rows(layers)
        if method.form != "relative":
            reparametrize(layers, method.form)
        return adapted
    kinds = {type(model.get_submodule(name)).__name__ for name in targets}
    try:
        if method.kind == "ia3":
            # As PEFT's own defaults have it: inputs of the second layer of an MLP are scaled, elsewhere outputs.
            hidden = model.config.get_text_config().hidden_size
            second = [name for name in targets if model.get_submodule(name).in_features != hidden]
            adapted = get_peft_model(model, IA3Config(feedforward_modules=second, **shared))
            # PEFT's IA3 hands on float32 from 4-bit layers; the Trainer's autocast hides that, and so does this.
            # Around the base's own forward: `generate` calls that one.
            inner = adapted.get_base_model()
            inner.forward = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)(
                inner.forward
            )
            return adapted
        if method.kind == "qalora":
            if not hasattr(model.get_submodule(targets[0]), "qweight"):
                raise Unavailable(f"PEFT has QA-LoRA for GPTQ layers alone, found {sorted(kinds)}.")
            size = model.get_submodule(targets[0]).group_size
            shared |= {"use_qalora": True, "qalora_group_size": size}
        return get_peft_model(model, LoraConfig(r=method.rank, lora_alpha=method.rank, lora_dropout=0.0, **shared))
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise Unavailable(f"PEFT has no {method.kind} for {sorted(kinds)}: {error}") from error


def count_trained(model: nn.Module, method: Method) -> int:
    """Numbers a method trains; the tied changes of a row count once."""
    if method.tied:
        return sum(
            module.scaled_weight.scales_shape[0] for module in model.modules() if isinstance(module, SGRQLinear)
        )
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
