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

from peft_sgrq.backends import ScaleBackend, resolve_backend
from peft_sgrq.selection.data import Batch
from peft_sgrq.selection.running import runner


class Reference:
    """The model before quantization.

    Args:
        reference (`nn.Module`, `str` or path): The model, or its checkpoint: a directory or a name on the Hub. Of a
            checkpoint only what is outside of the blocks is loaded. The weights of a block are read from the file each
            time the block runs, by accelerate's offloading, and dropped when it has run.
        model (`nn.Module`): The quantized model.
        stack (`str` or `None`): Name of the list of blocks.
        backends (`dict[str, ScaleBackend]`): The layers of the quantized model to be recovered.

    Attributes:
        model (`nn.Module`): The model, in eval mode while it is used.
        run (`Callable`): Runs it on a batch.

    Raises:
        ValueError: If it lacks layers or tensors, has layers of another shape, or another vocabulary.
        TypeError: If it is neither a model nor a path.
    """

    def __init__(
        self,
        reference: nn.Module | str | os.PathLike[str],
        model: nn.Module,
        stack: str | None,
        backends: Mapping[str, ScaleBackend],
    ) -> None:
        self._folder = None
        if isinstance(reference, (str, os.PathLike)):
            self._folder = tempfile.TemporaryDirectory(prefix="sgrq-")  # for checkpoints that are not safetensors
            reference = _load_streamed(os.fspath(reference), model, stack, self._folder.name)
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
        self.layers = _matching_layers(reference, backends)
        _check_vocabulary(reference, model)

    def blocks(self, count: int) -> Sequence[nn.Module]:
        """The first blocks.

        Raises:
            ValueError: If there is no such list of blocks, or it has fewer.
        """
        found = dict(self.model.named_modules()).get(self._stack or "")
        if not isinstance(found, nn.ModuleList) or len(found) < count:
            held = len(found) if isinstance(found, nn.ModuleList) else "none"
            raise ValueError(
                f"The reference has {held} of the {count} blocks {self._stack!r} of the model, expected the model "
                "that was quantized; give that one."
            )
        return list(found)[:count]

    @contextmanager
    def backend(self, name: str, group_size: int) -> Iterator[ScaleBackend]:
        """A layer seen as codes and scales, with its weights in memory while this is open."""
        module = self.layers[name]
        with align_module_device(module):
            yield resolve_backend(module, group_size)

    def weight(self, name: str, like: ScaleBackend) -> torch.Tensor:
        """The weight of a layer, float32 `[N, K]`, on the device of the quantized layer `like`."""
        with self.backend(name, like.group_size) as backend:
            return backend.dequantize(backend.scales(), torch.float32).to(like.device)

    def fingerprint(self) -> str:
        """A digest of the first layer, to tell one reference from another."""
        name = next(iter(self.layers))
        with self.backend(name, 64) as backend:
            return backend.fingerprint()


def _load_streamed(path: str, model: nn.Module, stack: str | None, folder: str) -> nn.Module:
    cls: Any = type(model)
    if not hasattr(cls, "from_pretrained"):
        raise TypeError(
            f"`reference` is a path and the model a {cls.__name__}, which cannot be loaded from one, expected a class "
            "with `from_pretrained`; give the reference model itself."
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"The reference {path!r} is quantized itself, found a `quantization_config`, expected the model before "
            "quantization; give that checkpoint, or load this one and give the model."
        )
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
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}{name}"] = place_on

    place("", model)
    return found


def _matching_layers(reference: nn.Module, backends: Mapping[str, ScaleBackend]) -> dict[str, nn.Module]:
    """The reference's modules of the layers to be recovered, by name."""
    modules = dict(reference.named_modules())
    missing = [name for name in backends if name not in modules]
    if missing:
        raise ValueError(
            f"The reference has no layer {missing[0]!r} ({len(missing)} are missing), expected the layers of the "
            "quantized model under the same names; give the model that was quantized."
        )
    for name, backend in backends.items():
        before = resolve_backend(modules[name], backend.group_size)
        found, expected = (before.out_features, before.in_features), (backend.out_features, backend.in_features)
        if found != expected:
            raise ValueError(
                f"Layer {name!r} of the reference has shape {found}, expected {expected}; give the model that was "
                "quantized."
            )
    return {name: modules[name] for name in backends}


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


def check_tokenizer(tokenizer: Any, reference: Any) -> None:
    """Refuses a tokenizer that is not that of the reference, if the reference is a checkpoint with one.

    Raises:
        ValueError: If they give tokens other numbers.
    """
    if tokenizer is None or not isinstance(reference, (str, os.PathLike)):
        return
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(os.fspath(reference))
    except (OSError, ValueError):
        return  # it has none
    found, expected = other.get_vocab(), tokenizer.get_vocab()
    if found != expected:
        token = next(iter(sorted(found.items() ^ expected.items())))[0]
        raise ValueError(
            f"The tokenizer of the reference is another one: token {token!r} is {found.get(token)} there and "
            f"{expected.get(token)} in the tokenizer given; give the reference of this model, or its own tokenizer."
        )
