"""The model before quantization, in memory or streamed from its checkpoint block by block."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import nn

from peft_sgrq.files.hub import check_source
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.running import runner


class Reference:
    """The model before quantization.

    Args:
        reference (`nn.Module`, `str` or path): The model, or its checkpoint: a directory or a name on the Hub. Of a
            checkpoint only what is outside of the blocks is loaded. The weights of a block are read from the file each
            time the block runs, by accelerate's offloading, and dropped when it has run.
        model (`nn.Module`): The quantized model.
        stack (`str` or `None`): Name of the list of blocks.
        scaled_weights (`dict[str, ScaledWeight]`): The layers of the quantized model to be recovered.

    Attributes:
        model (`nn.Module`): The model, in eval mode while it is used.
        layers (`dict[str, nn.Module]`): Its modules of the layers to be recovered.
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
    ) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.source: list[Any] | None = None
        if isinstance(reference, (str, os.PathLike)):
            self._folder = tempfile.TemporaryDirectory(prefix="sgrq-")  # for checkpoints that are not safetensors
            self.source = _describe_files(os.fspath(reference))
            try:
                reference = _load_streamed(os.fspath(reference), model, stack, self._folder.name)
            except BaseException:
                self.close()
                raise
        elif isinstance(reference, nn.Module) and any(parameter.is_meta for parameter in reference.parameters()):
            raise ValueError(
                "The reference is on the meta device or offloaded, expected one with weights; load it, or give its "
                "checkpoint, which is read block by block."
            )
        if not isinstance(reference, nn.Module):
            raise TypeError(
                f"`reference` is a {type(reference).__name__}, expected the model before quantization or its "
                "checkpoint; give one of them."
            )
        if reference is model:
            raise ValueError(
                "`reference` is the quantized model itself, expected the model it was quantized from; load that one."
            )
        self.model = reference
        self.run: Callable[[Batch], Any] = runner(reference)
        self.run_with_labels: Callable[[Batch], Any] = runner(reference, with_labels=True)
        self._stack = stack
        self.layers = _matching_layers(reference, scaled_weights)
        _check_vocabulary(reference, model)

    def close(self) -> None:
        """Deletes the temporary folder of a streamed checkpoint."""
        if self._folder is not None:
            self._folder.cleanup()

    def blocks(self, count: int) -> Sequence[nn.Module]:
        """The blocks, of which there must be `count`.

        Raises:
            ValueError: If there are more or fewer.
        """
        found = dict(self.model.named_modules()).get(self._stack or "")
        held = len(found) if isinstance(found, nn.ModuleList) else 0
        if held != count:
            raise ValueError(
                f"The reference has {held} blocks {self._stack!r} and the model {count}, expected as many; give the "
                "model that was quantized."
            )
        return list(found)  # type: ignore[arg-type]

    @contextmanager
    def scaled_weight(self, name: str, group_size: int) -> Iterator[ScaledWeight]:
        """A layer seen as codes and scales, with its weights in memory while this is open."""
        module = self.layers[name]
        with align_module_device(module):
            yield resolve_weight(module, group_size)

    def weight(self, name: str, like: ScaledWeight) -> torch.Tensor:
        """The weight of a layer, float32 `[N, K]`, on the device of the quantized layer `like`."""
        with self.scaled_weight(name, like.group_size) as scaled_weight:
            return scaled_weight.dequantize(scaled_weight.scales(), torch.float32).to(like.device)


def read_config(path: str) -> Any:
    """The config of a reference, a folder or a name on the Hub.

    Raises:
        ValueError: If it cannot be read, or is that of a quantized model.
    """
    from transformers import AutoConfig

    try:
        check_source(path, "reference")
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The reference {path!r} could not be read ({str(error).strip().splitlines()[0]}), expected the folder of "
            "a model or its name on the Hub; correct it."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The reference {path!r} is quantized itself, found a `quantization_config`, expected the model before "
            "quantization; give that checkpoint, or load this one and give the model."
        )
    return config


def _load_streamed(path: str, model: nn.Module, stack: str | None, folder: str) -> nn.Module:
    cls: Any = type(model)
    if not hasattr(cls, "from_pretrained"):
        raise TypeError(
            f"`reference` is a path and the model a {cls.__name__}, which cannot be loaded from one, expected a class "
            "with `from_pretrained`; give the reference model itself."
        )
    config = read_config(path)
    with torch.device("meta"):
        names = _device_map(cls(config), stack, next(iter(model.parameters())).device)
    loaded, info = cls.from_pretrained(
        path, dtype="auto", device_map=names, offload_folder=folder, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"The reference {path!r} lacks {len(missing)} tensors (the first: {missing[0]!r}), expected all of a "
            f"{cls.__name__}; give the whole checkpoint of the model that was quantized."
        )
    return loaded


def _describe_files(path: str) -> list[Any]:
    if not os.path.isdir(path):
        return [path]
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    return [[name, os.path.getsize(os.path.join(path, name))] for name in files]


def _device_map(model: nn.Module, stack: str | None, device: torch.device) -> dict[str, Any]:
    """Blocks to be read from disk, all else on a device; every module is named by exactly one entry."""
    found: dict[str, Any] = {}
    place_on = str(device) if device.index is None else device.index
    within = "" if stack is None else stack + "."

    def place(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full == stack:
                found.update({f"{full}.{index}": "disk" for index, _ in child.named_children()})
            elif within.startswith(full + "."):
                place(full + ".", child)
            else:
                found[full] = place_on
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[f"{prefix}{name}"] = place_on

    place("", model)
    return found


def _matching_layers(reference: nn.Module, scaled_weights: Mapping[str, ScaledWeight]) -> dict[str, nn.Module]:
    """The reference's modules of the layers to be recovered, by name."""
    modules = dict(reference.named_modules())
    missing = [name for name in scaled_weights if name not in modules]
    if missing:
        raise ValueError(
            f"The reference has no layer {missing[0]!r} ({len(missing)} are missing), expected the layers of the "
            "quantized model under the same names; give the model that was quantized."
        )
    for name, scaled_weight in scaled_weights.items():
        before = resolve_weight(modules[name], scaled_weight.group_size)
        found, expected = (
            (before.out_features, before.in_features),
            (scaled_weight.out_features, scaled_weight.in_features),
        )
        if found != expected:
            raise ValueError(
                f"Layer {name!r} of the reference has shape {found}, expected {expected}; give the model that was "
                "quantized."
            )
    return {name: modules[name] for name in scaled_weights}


def _check_vocabulary(reference: nn.Module, model: nn.Module) -> None:
    sizes = []
    for one in (reference, model):
        try:
            sizes.append(one.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The reference has a vocabulary of {sizes[0]} tokens and the model of {sizes[1]}, expected the same; "
            "give the model that was quantized, or resize its embeddings alike."
        )


def refuse_unquantized(reference: Reference, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    """Refuses a model without quantized layers whose weights are those of the reference, perhaps in another dtype.

    Dense weights that were rounded to few bits by other means differ, and can be recovered.

    Raises:
        ValueError: If all weights are the same.
    """
    for name, scaled_weight in scaled_weights.items():
        before, found = (
            reference.weight(name, scaled_weight),
            scaled_weight.dequantize(scaled_weight.scales(), torch.float32),
        )
        kept: Any = reference.layers[name].weight.dtype
        dtype: Any = scaled_weight.module.weight.dtype
        # Either may have been cast from the other's dtype.
        if not (torch.equal(found, before.to(dtype).float()) or torch.equal(before, found.to(kept).float())):
            return
    raise ValueError(
        f"The model is not quantized: found the weights of the reference in all {len(scaled_weights)} layers, expected"
        " some that quantization has changed, or there is nothing to recover; load it with quantization_config="
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), on the command line with `--quantize nf4`.'
    )


def check_tokenizer(tokenizer: Any, reference: Any) -> None:
    """Refuses a tokenizer that is not that of the reference, if the reference is a checkpoint with one.

    Raises:
        ValueError: If they give tokens other numbers.
    """
    if tokenizer is None or not isinstance(reference, (str, os.PathLike)):
        return
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(os.fspath(reference)).get_vocab()
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
