"""How a model is recovered, and what tells one recovery from another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.data import Batch
from peft_sgrq.recovery.preservation import IMPORTANCES
from peft_sgrq.recovery.reference import Reference

_SAMPLES = 64  # of a parameter, in a digest


@dataclass(frozen=True)
class Settings:
    """How a model is recovered; the fields are arguments of [`recover`] and described there."""

    epochs: int
    learning_rate: float
    augmented: bool
    preservation: float
    importance: str
    distill_steps: int
    distill_learning_rate: float
    seed: int

    def check(self) -> None:
        """Raises a ValueError or TypeError if a field has a value that cannot be used."""
        for name in ("epochs", "distill_steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"`{name}` is {value!r}, expected an int.")
            if value < 0:
                raise ValueError(f"`{name}` is {value}, expected 0 or more.")
        for name in ("learning_rate", "preservation", "distill_learning_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` is {value!r}, expected a number.")
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value}, expected a number >= 0.")
        if not isinstance(self.augmented, bool):
            raise TypeError(f"`augmented` is {self.augmented!r}, expected True or False.")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"`importance` is {self.importance!r}, expected one of {IMPORTANCES}.")
        if not self.epochs and not self.distill_steps:
            raise ValueError(
                "`epochs` and `distill_steps` are both 0 and nothing would be trained, expected one of them above 0."
            )


def first_stage(
    settings: Settings, config: Any, model: nn.Module, reference: Reference, batches: Iterable[Batch]
) -> dict[str, Any]:
    """What the result of the first stage depends on, as JSON values.

    Args:
        settings (`Settings`): How the model is recovered.
        config (`SGRQConfig`): The completed config of the adapter.
        model (`nn.Module`): The quantized model with the adapter, at its start.
        reference (`Reference`): The model before quantization.
        batches (`Iterable[Batch]`): The data.
    """
    data = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for key, tensor in sorted({**batch.inputs, "counted": batch.counted}.items()):
            data.update(f"{key} {tuple(tensor.shape)} ".encode())
            data.update(tensor.detach().cpu().float().numpy().tobytes())
    return {
        **{key: _plain(value) for key, value in asdict(settings).items() if not key.startswith("distill_")},
        "data": data.hexdigest(),
        "reference": {"source": reference.source, "parameters": digest_of(reference.model)},
        "base": config.base_fingerprint,
        "model": digest_of(model),
        "selection": config.selection,
        "adapter_dtype": config.adapter_dtype,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def digest_of(model: nn.Module) -> str:
    """A digest of samples of all parameters that are in memory, with their names, shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.data
        digest.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
        if type(values) is torch.Tensor and not values.is_meta:  # the fingerprints of layers tell the others apart
            flat = values.reshape(-1)
            samples = flat[:: max(1, flat.numel() // _SAMPLES)]
            digest.update(samples.double().cpu().numpy().tobytes())
    return digest.hexdigest()
