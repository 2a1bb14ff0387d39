"""transformers' Trainer refuses quantized models it calls untrainable, even when all that is trained is an adapter.

`transformers.trainer_utils.validate_quantization_for_training` asks the quantizer (`HfQuantizer.is_trainable`) and
does not look at the adapter: torchao's int4, intx and NVFP4, AutoRound and others are refused with "... do not support
training". For torchao the answer is a match on the name of the config (`TorchAoHfQuantizer.is_trainable`). A model
that gets an SGRQ adapter to train says that it can be; a Trainer still refuses it without one.
`tests/base/test_upstream_formats.py::test_transformers_still_calls_torchao_intx_untrainable` and
`tests/formats/test_packed_training.py::test_transformers_still_calls_autoround_untrainable` fail once this is not
needed any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TRAINABLE: dict[type, type] = {}  # class of a quantizer -> the same, but trainable


@contextmanager
def allow_quantized_training(model: nn.Module) -> Iterator[None]:
    """While this is open a Trainer can be made for a quantized model that transformers calls untrainable.

    The check is in the constructor of Trainer, so training itself may run outside. Afterwards the model answers as
    before. transformers still refuses a quantized model without an adapter.

    Args:
        model (`nn.Module`): The quantized model, or the PEFT model around it.

    Raises:
        ValueError: If transformers did not quantize the model: then it does not refuse it either.

    Example:
        ```py
        >>> with allow_quantized_training(model):
        ...     trainer = SFTTrainer(model, peft_config=SGRQConfig(task_type="CAUSAL_LM"), ...)
        >>> trainer.train()
        ```
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        raise ValueError(
            f"The model ({type(model).__name__}) has no `hf_quantizer`, expected one that transformers quantized; "
            "Trainer takes this model as it is."
        )
    cls = type(quantizer)
    quantizer.__class__ = _trainable(cls)
    try:
        yield
    finally:
        quantizer.__class__ = cls


def let_trainers_train(model: nn.Module) -> None:
    """Has a Trainer take a quantized model, from now on; one without an adapter it refuses all the same."""
    for module in model.modules():
        quantizer: Any = getattr(module, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_trainable:
            quantizer.__class__ = _trainable(type(quantizer))


def _trainable(cls: type) -> type:
    if cls in _TRAINABLE:
        return _TRAINABLE[cls]

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _made_again, (cls, dict(vars(self)))

    fields = {"is_trainable": True, "__module__": cls.__module__, "__reduce_ex__": reduce}
    made = _TRAINABLE[cls] = type(cls.__name__, (cls,), fields)
    return made


def _made_again(cls: type, state: dict[str, Any]) -> Any:
    """A copy, which a pickle cannot find by the name of its class."""
    made: Any = object.__new__(_trainable(cls))
    made.__dict__.update(state)
    return made
