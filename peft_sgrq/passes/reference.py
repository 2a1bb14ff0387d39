"""The model before quantization, in memory or streamed from its checkpoint block by block."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import nn

from peft_sgrq.base.workarounds.dropped_rotations import refuse_dropped_rotations
from peft_sgrq.files.gguf_names import is_gguf
from peft_sgrq.files.hub import check_source
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.running import runner


class Reference:
    """The model before quantization.

    Args:
        reference (`nn.Module`, `str` or path): The model, or its checkpoint: a directory or a name on the Hub. Only
            what is outside of the blocks of a checkpoint is loaded. The weights of a block are read from the file each
            time the block runs, by accelerate's offloading, and dropped when it has run.
        model (`nn.Module`): The quantized model.
        stack (`str` or `None`): Name of the list of blocks.
        scaled_weights (`dict[str, ScaledWeight]`): The layers of the quantized model that are compared.
        argument (`str`): What the user gave it as, for messages.

    Attributes:
        model (`nn.Module`): The model, in eval mode while it is used.
        layers (`dict[str, nn.Module]`): Its modules of those layers, by name.
        run, run_with_labels (`Callable`): Run it on a batch, without and with the labels.
        source (`list` or `None`): Names and sizes of the files of a checkpoint, to tell it from another.

    Raises:
        ValueError: If it lacks layers or tensors, has layers of another shape, or another vocabulary.
        TypeError: If it is neither a model nor a path.
    """

    def __init__(
        self,
        reference: nn.Module | str | os.PathLike[str],
        model: nn.Module,
        stack: str | None,
        scaled_weights: Mapping[str, ScaledWeight],
        argument: str = "reference",
    ) -> None:
        title = _title(argument)
        self.source: list[Any] | None = None
        if isinstance(reference, (str, os.PathLike)):
            folder = tempfile.mkdtemp(prefix="sgrq-")  # for checkpoints that are not safetensors
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.source = _describe_files(os.fspath(reference))
            reference = _load_streamed(os.fspath(reference), model, stack, folder, argument)
        elif isinstance(reference, nn.Module) and any(parameter.is_meta for parameter in reference.parameters()):
            raise ValueError(
                f"{title} is on the meta device or offloaded, expected one with weights; load it, or give its "
                "checkpoint, which is read block by block."
            )
        if not isinstance(reference, nn.Module):
            raise TypeError(
                f"`{argument}` is a {type(reference).__name__}, expected the model before quantization or its "
                "checkpoint; give one of them."
            )
        if reference is model:
            raise ValueError(
                f"`{argument}` is the quantized model itself, expected the model it was quantized from; load that one."
            )
        refuse_dropped_rotations(reference)
        self.model = reference
        self.run: Callable[[Batch], Any] = runner(reference)
        self.run_with_labels: Callable[[Batch], Any] = runner(reference, with_labels=True)
        self._stack = stack
        self.layers = _matching_layers(reference, scaled_weights, title)
        _check_vocabulary(reference, model, title)

    def blocks(self, count: int) -> Sequence[nn.Module]:
        """The blocks; a ValueError if there are more or fewer than `count`."""
        found = dict(self.model.named_modules()).get(self._stack or "")
        held = len(found) if isinstance(found, nn.ModuleList) else 0
        if held != count:
            raise ValueError(
                f"The reference has {held} blocks {self._stack!r} and the model {count}, expected as many; give the "
                "model that was quantized."
            )
        return list(found)  # type: ignore[arg-type]

    def weight(self, name: str, like: ScaledWeight) -> torch.Tensor:
        """The weight of a layer, float32 `[N, K]`, on the device of the quantized layer `like`."""
        with align_module_device(self.layers[name]):
            weight = resolve_weight(self.layers[name], like.group_size)
            return weight.dequantize(weight.scales(), torch.float32).to(like.device)


def _title(argument: str) -> str:
    """The model before quantization in a sentence, by what the user gave it as."""
    return "The reference" if argument == "reference" else f"`{argument}`"


def read_config(path: str, argument: str = "reference") -> Any:
    """The config of the model before quantization, of a folder or a name on the Hub.

    Raises:
        ValueError: If it cannot be read, or is that of a quantized model.
    """
    check_source(path, argument)
    title = _title(argument)
    if is_gguf(path):
        raise ValueError(f"{title} {path!r} is a GGUF file, expected the folder of a model in 16 bits; give that.")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{title} {path!r} could not be read ({str(error).strip().splitlines()[0]}), expected the folder of "
            "a model or its name on the Hub; correct it."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{title} {path!r} is quantized itself, found a `quantization_config`, expected the model before "
            "quantization; give that checkpoint, or load this one and give the model."
        )
    return config


def _load_streamed(path: str, model: nn.Module, stack: str | None, folder: str, argument: str) -> nn.Module:
    cls: Any = type(model)
    if not hasattr(cls, "from_pretrained"):
        raise TypeError(
            f"{_title(argument)} is a path and the model a {cls.__name__}, which cannot be loaded from one, expected "
            "a class with `from_pretrained`; give the model before quantization itself."
        )
    config, device = read_config(path, argument), next(iter(model.parameters())).device
    with torch.device("meta"):
        devices = _device_map(cls(config), stack, str(device) if device.index is None else device.index)
    loaded, info = cls.from_pretrained(
        path, dtype="auto", device_map=devices, offload_folder=folder, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{_title(argument)} {path!r} lacks {len(missing)} tensors (the first: {missing[0]!r}), expected all of a "
            f"{cls.__name__}; give the whole checkpoint of the model that was quantized."
        )
    return loaded


def _describe_files(path: str) -> list[Any]:
    if not os.path.isdir(path):
        return [path]
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    return [[name, os.path.getsize(os.path.join(path, name))] for name in files]


def _device_map(module: nn.Module, stack: str | None, device: int | str, prefix: str = "") -> dict[str, int | str]:
    """Blocks to be read from disk, all else on a device; every module is named by exactly one entry."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    found: dict[str, int | str] = {f"{prefix}{name}": device for name, _ in own}
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if full == stack:
            found |= {f"{full}.{index}": "disk" for index, _ in child.named_children()}
        elif f"{stack}.".startswith(f"{full}."):
            found |= _device_map(child, stack, device, f"{full}.")
        else:
            found[full] = device
    return found


def _matching_layers(
    reference: nn.Module, scaled_weights: Mapping[str, ScaledWeight], title: str
) -> dict[str, nn.Module]:
    """The reference's modules of the layers of the quantized model, by name."""
    modules = dict(reference.named_modules())
    missing = [name for name in scaled_weights if name not in modules]
    if missing:
        raise ValueError(
            f"{title} has no layer {missing[0]!r} ({len(missing)} are missing), expected the layers of the "
            "quantized model under the same names; give the model that was quantized."
        )
    for name, like in scaled_weights.items():
        before = resolve_weight(modules[name], like.group_size)
        found, expected = ((one.out_features, one.in_features) for one in (before, like))
        if found != expected:
            raise ValueError(
                f"Layer {name!r} of {title[0].lower()}{title[1:]} has shape {found}, expected {expected}; give the "
                "model that was quantized."
            )
    return {name: modules[name] for name in scaled_weights}


def _check_vocabulary(reference: nn.Module, model: nn.Module, title: str) -> None:
    sizes = []
    for one in (reference, model):
        try:
            sizes.append(one.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{title} has a vocabulary of {sizes[0]} tokens and the model of {sizes[1]}, expected the same; "
            "give the model that was quantized, or resize its embeddings alike."
        )


def refuse_unquantized(reference: Reference, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    """Refuses a model without quantized layers whose weights are those of the reference, perhaps in another dtype.

    Dense weights that were rounded to few bits by other means differ, and can be recovered.

    Raises:
        ValueError: If all weights are the same.
    """
    for name, scaled_weight in scaled_weights.items():
        before = reference.weight(name, scaled_weight)
        found = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)
        dtypes: list[Any] = [layer.weight.dtype for layer in (reference.layers[name], scaled_weight.module)]
        # Either may have been cast from the other's dtype.
        if not any(torch.equal(found.to(dtype), before.to(dtype)) for dtype in dtypes):
            return
    raise ValueError(
        f"The model is not quantized: found the weights of the reference in all {len(scaled_weights)} layers, expected"
        " some that quantization has changed, or there is nothing to recover; load it with quantization_config="
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), on the command line with `--quantize nf4`.'
    )


def check_tokenizer(tokenizer: Any, reference: Any) -> None:
    """A ValueError if the reference is a checkpoint with a tokenizer that gives tokens other numbers."""
    if tokenizer is None or not isinstance(reference, (str, os.PathLike)):
        return
    try:
        found = transformers.AutoTokenizer.from_pretrained(os.fspath(reference)).get_vocab()
        expected = tokenizer.get_vocab()
    except (AttributeError, NotImplementedError, OSError, ValueError):
        return  # there is none, or it has no list of tokens
    # Added tokens may be in one of them only.
    different = sorted(token for token in found.keys() & expected.keys() if found[token] != expected[token])
    if different or not found.keys() & expected.keys():
        token = different[0] if different else min(expected)
        raise ValueError(
            f"The tokenizer of the reference is another one: token {token!r} is {found.get(token)} there and "
            f"{expected[token]} in the tokenizer given; give the reference of this model, or its own tokenizer."
        )
