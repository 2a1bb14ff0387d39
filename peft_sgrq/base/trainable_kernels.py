"""Kernels of GPTQ, AWQ and AutoRound that scales can be trained through, in models that were loaded with others.

The kernel of these formats is chosen while a model is loaded, for the speed of inference. Most of them repack their
layers, or lose the gradient of their input. `AutoPeftModelForCausalLM` and the like load a base before an adapter's
tuner is asked, so there is no argument to choose another by. The layers are then loaded again, by the loader of the
format, onto the kernel that can be trained through, and take the places of the others.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from peft_sgrq.formats.loading import kernel_arguments, quantization_code
from peft_sgrq.formats.registry import runs_on_trainable_kernel

logger = logging.getLogger(__name__)


def kernel_config(quantization: Mapping[str, Any]) -> Any:
    """The quantization config that loads a checkpoint onto the kernel which can be trained through.

    Args:
        quantization (`Mapping`): The fields of the checkpoint's own quantization config.

    Returns:
        A config of transformers, or `None` for a format whose kernel is not chosen at loading.
    """
    found = kernel_arguments(quantization)
    return None if found is None else getattr(transformers, found[0])(**found[1])


def use_trainable_kernels(model: nn.Module) -> None:
    """Puts the layers of a model that run on other kernels onto the ones that scales can be trained through.

    A model that transformers did not load from a checkpoint stays as it is, and is refused later, with a sentence that
    says how to load it. Takes the time of loading the model, and memory for its quantized layers, once more.

    Args:
        model (`nn.Module`): The model, or a wrapper of it; changed in place.
    """
    for loaded in list(model.modules()):
        quantizer: Any = getattr(loaded, "hf_quantizer", None)
        if not getattr(quantizer, "pre_quantized", False):
            continue
        names = [name for name, module in loaded.named_modules() if not runs_on_trainable_kernel(module)]
        if names:
            _load_again(loaded, quantizer, names)


def _load_again(model: Any, quantizer: Any, names: list[str]) -> None:
    fields = quantizer.quantization_config.to_dict()
    kernel = kernel_config(fields)
    if kernel is None or any(tensor.is_meta for tensor in model.parameters()):
        return
    places = getattr(model, "hf_device_map", None) or {"": model.device}
    source = model.name_or_path
    revision = None if os.path.isdir(source) else getattr(model.config, "_commit_hash", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # for the kernel alone
            fresh = type(model).from_pretrained(
                source,
                dtype=model.dtype,
                device_map=places,
                quantization_config=kernel,
                **({"revision": revision} if revision else {}),
            )
    except (OSError, ValueError) as error:  # the checkpoint has gone, or the model is a part of another's
        logger.debug("%s could not be loaded again: %s", source, error)
        return
    found = dict(fresh.named_modules())
    for name in names:
        layer = found.get(name)
        if layer is None or not runs_on_trainable_kernel(layer):
            return
        layer.train(model.get_submodule(name).training)
    for name in names:
        model.set_submodule(name, found[name])
    logger.warning(
        "%d layers were loaded again, onto a kernel that scales can be trained through; "
        "`quantization_config=%s` loads %s so at once.",
        len(names),
        quantization_code(fields),
        source,
    )
