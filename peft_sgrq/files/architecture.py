"""What transformers knows of a checkpoint's model: its names in memory and on the disk, and which tensors it ties."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import transformers

logger = logging.getLogger(__name__)

_TIE = "tie_word_embeddings"


class Architecture:
    """A model of transformers without its weights: built from a config on the meta device, which takes no memory.

    Args:
        model (`nn.Module`): The model on the meta device.

    Attributes:
        name (`str`): Its class.
        shapes (`dict[str, tuple[int, ...]]`): Its parameters and buffers, by their names in memory.
        ties (`dict[str, str]`): Names in memory of tensors that are others: target -> source, as transformers ties
            them where a checkpoint does not hold both with different values.
        input_embedding (`str` or `None`): Name in memory of the weight of the input embedding.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = type(model).__name__
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._modules = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
        embedding = _input_embedding(model)
        names = (name for name, module in model.named_modules() if module is embedding)
        self.input_embedding = None if embedding is None else f"{next(names)}.weight"

    def has_layer(self, name: str) -> bool:
        """Whether a module of this name has no modules within it."""
        return name in self._modules

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is the model's, or one that a quantized layer of it is stored with."""
        if name in self.shapes:
            return True
        parent = name
        while parent := parent.rpartition(".")[0]:
            if parent in self._modules:
                return True
        return False

    def in_memory(self, keys: Iterable[str]) -> dict[str, str]:
        """The names in memory of a checkpoint's tensors, by transformers' own mapping.

        Tensors that are put together or taken apart while they are loaded (fused experts) keep the checkpoint's name.

        Args:
            keys (`Iterable[str]`): Names in the checkpoint.
        """
        return {key: key if converted else name for key, (name, converted) in self._renamed(keys).items()}

    def not_loaded(self, keys: Iterable[str]) -> set[str]:
        """Those of a checkpoint's tensors that the model has no use for."""
        return {key for key, (name, _) in self._renamed(keys).items() if not self.has(name)}

    def _renamed(self, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
        """The names of what tensors become, and whether that is more than another name."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        conversions = _conversions(self._model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        found = {}
        for key in sorted(keys, key=dot_natural_key):  # the order in which transformers loads; some renamings need it
            name, pattern = rename_source_key(key, renamings, converters)
            found[key] = self._with_prefix(name), pattern is not None
        return found

    def on_disk(self, name: str) -> str:
        """The name under which transformers would save a tensor of the model."""
        from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

        # As `save_pretrained` does it: in the opposite order, without what cannot be told from the name.
        kept = [entry for entry in _conversions(self._model, legacy=False) if isinstance(entry, WeightRenaming)]
        renamings = [entry.reverse_transform() for entry in reversed(kept) if not isinstance(entry, PrefixChange)]
        saved = apply_renamings(name, renamings)
        return saved if self.in_memory([saved])[saved] == name else name

    def _with_prefix(self, name: str) -> str:
        """A name with the prefix of the bare model, or without, whichever the model has."""
        prefix = getattr(self._model, "base_model_prefix", "")
        if not prefix or self.has(name):
            return name
        shorter = name.removeprefix(f"{prefix}.")
        for other in (f"{prefix}.{name}", shorter):
            if other != name and self.has(other):
                return other
        return name

    def untied(self, config: dict[str, Any], targets: Collection[str]) -> tuple[dict[str, Any], set[str]] | None:
        """The config with which the model does not tie some tensors and is the same otherwise, and what it unties.

        `tie_word_embeddings` means more in some models (it scales the decoder's output in T5). There is no such
        config for them, and for models that tie whatever it says. transformers ties no tensors that a checkpoint
        holds with different values, so it reads a checkpoint that holds all of them rightly all the same.

        Args:
            config (`dict[str, Any]`): The fields of `config.json`.
            targets (`Collection[str]`): Tensors of `ties` that are not to be tied.
        """
        if any(_reads_tie(type(module)) for module in self._model.modules()):
            return None
        for levels in (("",), ("", "text_config")):
            changed = copy.deepcopy(config)
            for level in levels:
                fields = changed if not level else changed.get(level)
                if isinstance(fields, dict) and (not level or fields.get(_TIE)):
                    fields[_TIE] = False
            other = build(changed, [self.name])
            if other is None or not set(other.ties).isdisjoint(targets):
                continue
            before, after = (_without_tie(item._model.config.to_dict()) for item in (self, other))
            if before == after:
                return changed, set(self.ties) - set(other.ties)
        return None


def build(config: Mapping[str, Any], classes: Iterable[str], names: Collection[str] = ()) -> Architecture | None:
    """The model of a checkpoint, as the class that has most of some names; `None` if transformers does not know it.

    Args:
        config (`Mapping[str, Any]`): The fields of `config.json`.
        classes (`Iterable[str]`): Names of classes of transformers, the likeliest first.
        names (`Collection[str]`): Names of layers in memory.
    """
    best, most = None, -1
    for name in dict.fromkeys(classes):
        architecture = _build(config, name)
        if architecture is None:
            continue
        count = sum(architecture.has_layer(layer) for layer in names)
        if count > most:
            best, most = architecture, count
        if count == len(names):
            break
    return best


def _build(config: Mapping[str, Any], class_name: str) -> Architecture | None:
    model_class: Any = getattr(transformers, class_name, None)
    if model_class is None or not isinstance(model_class, type):
        return None
    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        own = transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(copy.deepcopy(fields))
        with torch.device("meta"):
            return Architecture(model_class(own))
    except Exception as error:
        # Whatever a model's own code says of a config it does not take: the names on the disk are then all we have.
        logger.debug("%s cannot be built from its config: %s", class_name, error)
        return None


def _conversions(model: Any, legacy: bool = True) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, add_legacy=legacy)


def renamed_as_loaded(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of a checkpoint of a model of transformers, or of an older version of it -> its names in memory.

    Args:
        model (`nn.Module`): The model; one that transformers does not know has no names to change.
        names (`Iterable[str]`): Names of tensors.
    """
    names = list(names)
    if not hasattr(getattr(model, "config", None), "model_type") or not hasattr(model, "base_model_prefix"):
        return dict(zip(names, names, strict=True))
    return Architecture(model).in_memory(names)


def _input_embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # models that have none say so in one of these ways
        return None


def _reads_tie(module_class: type) -> bool:
    """Whether the forward pass of a class asks whether embeddings are tied."""
    try:
        return _TIE in inspect.getsource(module_class.forward)  # type: ignore[attr-defined]
    except (AttributeError, OSError, TypeError):
        return False


def _without_tie(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tie(item) for key, item in value.items() if key != _TIE}
    return value
