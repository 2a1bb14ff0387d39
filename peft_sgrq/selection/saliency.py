"""The saliency of a model's columns, and the selections it gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from peft_sgrq.choices import DEFAULT_BUDGET, DEFAULT_RATIO, Budget, Ratio, check_ratio, check_ratio_pattern
from peft_sgrq.config import SGRQConfig
from peft_sgrq.layer.base_layers import named_base_layers, scaled_weight_of
from peft_sgrq.layer.masks import encode_mask
from peft_sgrq.selection.criteria import COMPARABLE
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.ratio import (
    budget_in_scales,
    count_selected,
    counts_above_threshold,
    knee,
    select_top,
)
from peft_sgrq.selection.saliency_file import read_saliency_file, write_saliency_file


@dataclass(eq=False)
class Saliency:
    """Saliency of the columns of a model's layers; trying another ratio costs nothing.

    [`calibrate`] makes it; [`Saliency.load`] reads it back from one safetensors file.

    Attributes:
        layers (`dict[str, LayerSaliency]`): By module name, in the order of the model.
        criterion (`str`): Name of the criterion, or of the user's function.
        tokens (`int`): Calibration tokens seen, padding not counted, on all processes together.
        seconds (`dict[str, float]`): Wall time by what it was spent on; `"total"` is all of it.
        ratios (`dict[str, float]`): Module name -> the ratio that `"layerwise"` found; empty if it was not asked for.

    Example:
        ```py
        >>> saliency = peft_sgrq.calibrate(model, config, texts, tokenizer=tokenizer)
        >>> saliency.save("saliency.safetensors")
        >>> peft_sgrq.Saliency.load("saliency.safetensors").configure(config, ratio="knee")
        ```
    """

    layers: dict[str, LayerSaliency]
    criterion: str
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        """Module name -> saliency of each column (row in a row format), float32."""
        return {name: layer.scores for name, layer in self.layers.items()}

    def group_scores(self, name: str) -> torch.Tensor:
        """Saliency of each group (row in a row format) of a layer, float32 `[selectable]`."""
        return self.layers[name].group_scores()

    def counts(
        self,
        ratio: Ratio | Mapping[str, float] = DEFAULT_RATIO,
        ratio_pattern: Mapping[str, Ratio] | None = None,
        budget: Budget = DEFAULT_BUDGET,
        bytes_per_scale: int = 4,
    ) -> dict[str, int]:
        """How many groups of each layer are selected; the arguments are those of [`select`]."""
        if not isinstance(ratio, Mapping):
            check_ratio(ratio)
        fixed_ratios = self.overruled(ratio_pattern)
        counts = {name: self._count(name, found) for name, found in fixed_ratios.items()}
        rest = {name: layer for name, layer in self.layers.items() if name not in counts}
        if ratio == "global":
            fixed = sum(self.layers[name].scales_per_group * count for name, count in counts.items())
            total = sum(layer.scales for layer in self.layers.values())
            found = counts_above_threshold(
                [self._comparable_scores(layer) for layer in rest.values()],
                [layer.scales_per_group for layer in rest.values()],
                budget_in_scales(budget, total, bytes_per_scale),
                fixed,
            )
            counts |= dict(zip(rest, found, strict=True))
        else:
            counts |= {name: self._count(name, self._ratio_of(name, ratio)) for name in rest}
        return {name: counts[name] for name in self.layers}

    def overruled(self, ratio_pattern: Mapping[str, Ratio] | None) -> dict[str, Ratio]:
        """The layers that a `ratio_pattern` names, and their ratios."""
        pattern = dict(ratio_pattern or {})
        check_ratio_pattern(pattern)
        keys = {name: get_pattern_key(list(pattern), name) for name in self.layers}
        return {name: pattern[key] for name, key in keys.items() if key in pattern}

    def _ratio_of(self, name: str, ratio: Ratio | Mapping[str, float]) -> Ratio:
        if ratio == "layerwise":
            if not self.ratios:
                raise ValueError(
                    '`ratio` is "layerwise", which is found by measuring the loss, and this saliency has no such '
                    'ratios (expected them in `ratios`); calibrate with a config whose `ratio` is "layerwise".'
                )
            ratio = self.ratios
        if isinstance(ratio, Mapping):
            if name not in ratio:
                raise ValueError(
                    f"`ratio` has no entry for layer {name!r}, expected one for each of {len(self.layers)} layers; "
                    "add it, or set it in `ratio_pattern`."
                )
            check_ratio(ratio[name], f"ratio[{name!r}]")
            return ratio[name]
        return ratio

    def _count(self, name: str, ratio: Ratio) -> int:
        layer = self.layers[name]
        return count_selected(knee(layer.scores) if ratio == "knee" else float(ratio), layer.selectable)

    def _comparable_scores(self, layer: LayerSaliency) -> torch.Tensor:
        # Scores in units of the model's loss compare as they are, by the scale. All others are about the output of
        # their own layer and compare relative to the mean of that.
        scores = layer.group_scores().double()
        if self.criterion in COMPARABLE:
            return scores / layer.scales_per_group
        mean = scores.mean()
        return scores / mean if mean > 0 else scores

    def select(
        self,
        ratio: Ratio | Mapping[str, float] = DEFAULT_RATIO,
        ratio_pattern: Mapping[str, Ratio] | None = None,
        budget: Budget = DEFAULT_BUDGET,
        bytes_per_scale: int = 4,
    ) -> dict[str, str]:
        """The most salient groups of each layer.

        Args:
            ratio (`float`, `str` or `dict[str, float]`): Share of the groups of each layer; `"knee"`: the layer's
                share of columns above the winsorised mean; `"global"`: one threshold over all layers at which `budget`
                is spent; `"layerwise"`: the ratios found by measuring the loss; or a ratio for each module name.
            ratio_pattern (`dict[str, float | "knee"]`): Overrules `ratio` for modules whose name, or its end, matches
                a pattern; the first that does counts, as in PEFT's `rank_pattern`.
            budget (`float`, `int` or `str`): For `"global"`: a share of all scales (`float`), a number of scales
                (`int`), or a size of the adapter's deltas such as `"20MB"`; the layers of `ratio_pattern` included.
            bytes_per_scale (`int`): What a trained scale takes in the adapter file: 4, or 2 in bfloat16.

        Returns:
            `dict[str, str]`: Module name -> bit mask in hexadecimal, as in `SGRQConfig.selection`.

        Raises:
            ValueError, TypeError: If an argument cannot be used, or the budget is less than one group in each layer.
        """
        counts = self.counts(ratio, ratio_pattern, budget, bytes_per_scale)
        return {
            name: encode_mask(select_top(layer.group_scores(), counts[name]), layer.selectable)
            for name, layer in self.layers.items()
        }

    def selection_for(
        self, config: SGRQConfig, ratio: Ratio | Mapping[str, float] | None = None, budget: Budget | None = None
    ) -> dict[str, str]:
        """What [`select`] gives for the fields of a config, or for another ratio or budget."""
        return self.select(
            config.ratio if ratio is None else ratio,
            config.ratio_pattern,
            config.budget if budget is None else budget,
            bytes_per_scale=2 if config.adapter_dtype == "bfloat16" else 4,
        )

    def configure(
        self, config: SGRQConfig, ratio: Ratio | Mapping[str, float] | None = None, budget: Budget | None = None
    ) -> SGRQConfig:
        """Fills a config in place: its selection, the criterion, and the base the selection is for.

        Args:
            config (`SGRQConfig`): The config; its `ratio`, `ratio_pattern` and `budget` say how many are selected.
            ratio (`float`, `str` or `dict[str, float]`): Replaces `config.ratio` (a dict does so for this call only).
            budget (`float`, `int` or `str`): Replaces `config.budget`.

        Returns:
            `SGRQConfig`: The same config.

        Raises:
            ValueError: If the config targets none of the layers, or an argument cannot be used; it is unchanged then.
        """
        chosen = self._targeted_by(config)
        selection = chosen.selection_for(config, ratio, budget)
        if ratio is not None and not isinstance(ratio, Mapping):
            config.ratio = ratio
        if budget is not None:
            config.budget = budget
        config.selection = selection
        config.criterion = self.criterion
        config.base_fingerprint = {name: layer.fingerprint for name, layer in chosen.layers.items()}
        return config

    def _targeted_by(self, config: SGRQConfig) -> Saliency:
        targets = config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return self
        layers = {name: layer for name, layer in self.layers.items() if check_target_module_exists(config, name)}
        if not layers:
            raise ValueError(
                f"The config targets none of the {len(self.layers)} layers of this saliency (target_modules="
                f"{targets!r}, the first layer is {next(iter(self.layers), None)!r}); use the config it was made with."
            )
        return replace(self, layers=layers)

    def check(self, model: nn.Module) -> None:
        """Raises a ValueError if this is not the saliency of the layers of `model`, with its codes and scales."""
        modules = dict(named_base_layers(model))
        for name, layer in self.layers.items():
            module = modules.get(name)
            found = None if module is None else scaled_weight_of(name, module, layer.group_size).fingerprint()
            if found != layer.fingerprint:
                raise ValueError(
                    f"The saliency is that of another model: layer {name!r} "
                    f"{'does not exist in this one' if found is None else f'is {found} here'}, expected "
                    f"{layer.fingerprint} (format:weights:scales); calibrate this model, or load the one it is of."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; an existing file is replaced only by a whole one."""
        described = {
            "criterion": self.criterion,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "ratios": self.ratios,
        }
        write_saliency_file(os.fspath(path), self.layers, described)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Saliency:
        """Reads a file that [`Saliency.save`] wrote.

        Raises:
            ValueError: If the file is truncated, no saliency file, of a newer version, or has scores that are none.
            OSError: If there is none.
        """
        layers, described = read_saliency_file(os.fspath(path))
        return cls(layers=layers, **described)
