"""The configuration of an SGRQ adapter."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from peft_sgrq.choices import (
    ADAPTER_DTYPES,
    DEFAULT_BUDGET,
    DEFAULT_RATIO,
    check_budget,
    check_criterion,
    check_ratio,
    check_ratio_pattern,
    without_wrapper_names,
)

FORMAT_VERSION = 1


@dataclass
class SGRQConfig(PeftConfig):
    """Configuration of an [`SGRQModel`]: saliency-guided tuning of the scales of a quantized model.

    The fields from `selection` on are written when the adapter is injected, and saved with it. The config given to
    `get_peft_model` stays as it is and can be used for other models; `model.peft_config` holds the completed copy.

    Args:
        target_modules (`list[str]`, `str` or `None`): Layers to adapt. `None`: every quantized layer, or in a model
            without any, every `nn.Linear` and `Conv1D` but the output head. A list matches names or their ends, a
            string is a regular expression, `"all-linear"` means what it means in PEFT and every quantized layer.
        exclude_modules (`list[str]`, `str` or `None`): Layers to leave alone, matched likewise.
        ratio (`float` or `str`): Share of the column groups whose scales are trained (of the rows, in a format with
            one scale a row), in (0, 1]; at least one in each layer. 1.0, the default, trains every scale (PEQA) and
            gains most; 0.4, the share of the SGR-Q paper, makes adapter and optimizer less than half as large.
            `"knee"` takes the share of each layer's columns above its mean saliency, `"global"` one threshold over all
            layers at which `budget` is spent, `"layerwise"` what calibration finds best by measuring the loss.
        zero_points (`bool`): Also train the zero points, of all groups, where the format stores them as floats (GGUF's
            Q4_1, Q5_1, Q2_K, Q4_K and Q5_K, HQQ, quanto's int4 and int2, torchao's int4). With `ratio=0` they alone
            are trained, at next to no cost.
        ratio_pattern (`dict[str, float | "knee"]`): Module name, its end, or a pattern of it -> ratio, overruling
            `ratio` there; matched like PEFT's `rank_pattern`.
        budget (`float`, `int` or `str`): What `"global"` and `"layerwise"` may spend: a share of all scales (`float`),
            a number of scales (`int`), or a size of the adapter's deltas such as `"20MB"`.
        criterion (`str` or `None`): How salience is measured: obs, billm, diag, error, fisher, gradient, magnitude
            or random (docs/selection.md). `None`: diag when calibrated, else magnitude, which needs no data.
        group_size (`int`): Columns per scale in a layer that is not quantized; a quantized one has its own.
        adapter_dtype (`"float32"` or `"bfloat16"`): With `"bfloat16"` the forward pass rounds the deltas to it, so
            that the adapter file of half the size holds what was trained. Training keeps float32 values either way.
        init_weights (`bool` or `str`): `True` starts at zero change, where outputs equal the base's bit for bit. The
            folder of a saved SGRQ adapter, or its name on the Hub, starts from that one, selecting the same scales:
            from a recovery, say. `False` starts from small random changes, for tests.
        layers_to_transform (`list[int]`, `int` or `None`): Indices of the blocks to adapt.
        layers_pattern (`list[str]`, `str` or `None`): Name of the list of blocks those indices count in.
        modules_to_save (`list[str]` or `None`): Further modules to train and save whole.
        trainable_token_indices (`list[int]`, `dict[str, list[int]]` or `None`): Embedding rows to train.
        check_learning_rate (`bool`): Warn once if Adam is to train the adapter at a rate below 1e-3, at which scales
            hardly move; 6e-3 is the recommended one.
        selection (`dict[str, str]` or `None`): Layer name -> bit mask of its selected groups in hexadecimal, the
            first group the highest bit. [`calibrate`] fills it; missing ones are chosen without data. With `ratio=1.0`
            a layer that is not named has all of them, and masks of all are not written to files.
        base_fingerprint (`dict[str, str]` or `None`): Layer name -> digest of the base layer. Where it is given,
            another base is refused; set it to `None` to load the adapter on another base all the same.
        base_quantization (`dict` or `None`): The quantization config of the base, to say how to load it.
        sgrq_version (`int`): Version of the adapter format.

    Raises:
        ValueError, TypeError: If a field has a value that cannot be used; the sentence says which, and what can.
    """

    # What else is written where a config is saved: the model card, once the plugin is registered.
    written_beside: ClassVar[list[Callable[[str, SGRQConfig], None]]] = []
    # The folder of the adapter this config was loaded from.
    loaded_from: ClassVar[str | None] = None

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    ratio: float | str = DEFAULT_RATIO
    zero_points: bool = False
    ratio_pattern: dict[str, float | str] = field(default_factory=dict)
    budget: float | int | str = DEFAULT_BUDGET
    criterion: str | None = None
    group_size: int = 64
    adapter_dtype: str = "float32"
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    check_learning_rate: bool = True
    selection: dict[str, str] | None = None
    base_fingerprint: dict[str, str] | None = None
    base_quantization: dict[str, Any] | None = None
    sgrq_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SGRQ")
        self._forget_wrappers()
        # Names of layers in the file of the adapter -> in the model it was loaded on, where they differ; not a field.
        self.renamed_layers: dict[str, str] = {}
        # The masks of all groups, by layer, where a selection that is not in the file means these; not a field.
        self.full_masks: dict[str, str] = {}
        # What a Trainer trains the adapter with, for its model card: row -> text; not a field.
        self.trained_with: dict[str, str] = {}
        self._check_version()
        self._check_targets()
        self._check_numbers()
        _check_string_dict("selection", self.selection, "layer names to hexadecimal masks")
        _check_string_dict("base_fingerprint", self.base_fingerprint, "layer names to digests")
        if self.base_quantization is not None and not isinstance(self.base_quantization, dict):
            raise TypeError(
                f"`base_quantization` is {self.base_quantization!r}, expected a dict of the fields of a quantization "
                "config, or None to have it written."
            )
        for name, mask in (self.selection or {}).items():
            if not _is_hex(mask):
                raise ValueError(
                    f"`selection[{name!r}]` is {mask!r}, expected a bit mask in hexadecimal digits; take the "
                    "selection from the adapter_config.json it was saved in."
                )

    def _forget_wrappers(self) -> None:
        """Has every field name layers as they are in a model that nothing has wrapped."""
        # PEFT's matching expects sets; its save_pretrained turns them into lists.
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        for field_name in ("selection", "base_fingerprint"):
            value = getattr(self, field_name)
            if isinstance(value, dict):
                plain = {
                    without_wrapper_names(key) if isinstance(key, str) else key: item for key, item in value.items()
                }
                setattr(self, field_name, plain)

    def _check_version(self) -> None:
        version = self.sgrq_version
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"The adapter has `sgrq_version` {version!r}, this peft-sgrq reads versions 1 to {FORMAT_VERSION}; "
                "install a newer peft-sgrq."
            )

    def _check_targets(self) -> None:
        for field_name in ("target_modules", "exclude_modules", "layers_pattern"):
            if not isinstance(getattr(self, field_name), str):
                _check_names(field_name, getattr(self, field_name), "a list of names, a str, or None")
        _check_names("modules_to_save", self.modules_to_save, 'a list of names such as ["lm_head"], or None')
        indices = self.layers_to_transform
        indices = [indices] if isinstance(indices, int) else indices
        if indices is not None and not (
            isinstance(indices, (list, tuple)) and all(type(index) is int for index in indices)
        ):
            raise TypeError(f"`layers_to_transform` is {indices!r}, expected the index of a block or a list of them.")
        for field_name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, field_name) is not None:
                raise ValueError(
                    f"`{field_name}` cannot be used when `target_modules` is a str, found "
                    f"target_modules={self.target_modules!r}; give `target_modules` as a list, or put the layer "
                    "indices into the expression."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"When `layers_pattern` is specified ({self.layers_pattern!r}), `layers_to_transform` must also be "
                "specified, found None; give the indices of the blocks, or leave `layers_pattern` out."
            )

    def _check_numbers(self) -> None:
        for name in ("zero_points", "check_learning_rate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` is {getattr(self, name)!r}, expected True or False.")
        if not (self.zero_points and self.ratio == 0 and not isinstance(self.ratio, (bool, str))):
            check_ratio(self.ratio)
        check_ratio_pattern(self.ratio_pattern)
        check_budget(self.budget)
        if self.criterion is not None:
            check_criterion(self.criterion)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise TypeError(f"`group_size` is {self.group_size!r}, expected a positive int such as 64.")
        if self.group_size < 1:
            raise ValueError(f"`group_size` is {self.group_size}, expected a positive int such as 64.")
        # torch.bfloat16 is taken for "bfloat16", as elsewhere in the ecosystem.
        self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise ValueError(
                f"`adapter_dtype` is {self.adapter_dtype!r}, expected one of {ADAPTER_DTYPES}; float32 is exact on "
                "resuming, bfloat16 halves the file."
            )
        if isinstance(self.init_weights, os.PathLike):
            self.init_weights = os.fspath(self.init_weights)
        if not isinstance(self.init_weights, (bool, str)):
            raise TypeError(
                f"`init_weights` is {self.init_weights!r}, expected True (zero change), the folder of a saved "
                "adapter, or False (random)."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SGRQConfig:
        """Loads the config of a saved adapter, and remembers where it was.

        Raises:
            ValueError: If there is no config, or a field is wrong.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.loaded_from = os.path.join(pretrained_model_name_or_path, subfolder or "")
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and, beside saved adapter weights, the model card `README.md`."""
        if self.auto_mapping is not None:
            kwargs["auto_mapping_dict"] = None  # PEFT's own names the class, and not what else loading takes
        plain = copy.copy(self)
        plain._forget_wrappers()
        written = copy.copy(plain)
        written.selection = plain._written_selection()
        super(SGRQConfig, written).save_pretrained(save_directory, **kwargs)
        for write in self.written_beside:
            write(save_directory, plain)

    def _written_selection(self) -> dict[str, str] | None:
        """The selection without what follows from a ratio of 1: 350 KB of "f" for an 8B model in int8."""
        if self.selection is None:
            return None
        masks = self.full_masks
        return {name: mask for name, mask in self.selection.items() if masks.get(name) != mask} or None


def _as_set(names: Any) -> Any:
    if not isinstance(names, (list, tuple, set)):
        return names
    return {without_wrapper_names(name) if isinstance(name, str) else name for name in names}


def _check_string_dict(name: str, value: Any, what: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` is {value!r}, expected a dict from {what}, or None to have it written.")
    for item in value.items():
        if not all(isinstance(text, str) for text in item):
            raise TypeError(f"`{name}` has the item {item!r}, expected a dict from {what}; correct the item.")


def _check_names(name: str, value: Any, mend: str) -> None:
    if value is not None and not (
        isinstance(value, (list, tuple, set)) and all(isinstance(text, str) for text in value)
    ):
        raise TypeError(f"`{name}` is {value!r}, expected {mend}.")


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and all(character in "0123456789abcdef" for character in text)
