"""An adapter that starts from another one, a recovery for instance."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from peft_sgrq.adapter.stored import StoredDelta, read_adapter
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.sources import find_folder
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.layer.masks import decode_mask, encode_mask

logger = logging.getLogger(__name__)


class StartingPoint:
    """A saved adapter whose deltas a new one begins with.

    Args:
        source (`str`): Folder of the adapter, or its name on the Hub.

    Raises:
        ValueError: If there is none, it is no SGRQ adapter, or it holds more than scales.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        adapter = read_adapter(find_folder(source, "adapter of `init_weights`"))
        self._config, self._deltas = adapter.config, adapter.deltas
        if adapter.whole or adapter.rows:
            raise ValueError(
                f"The adapter {source!r} of `init_weights` has modules or embedding rows trained whole, expected "
                "scales alone; load it with `PeftModel.from_pretrained(..., is_trainable=True)` to go on training it."
            )

    def configure(self, config: SGRQConfig, scaled_weights: Mapping[str, ScaledWeight]) -> None:
        """Has a config select what the adapter does, on the base it was trained on.

        Args:
            config (`SGRQConfig`): The config of the new adapter; changed in place.
            scaled_weights (`dict[str, ScaledWeight]`): The layers it targets, by name.

        Raises:
            ValueError: If it leaves out layers or scales that the adapter changes, or these have other shapes.
        """
        missing = [name for name in self._deltas if name not in scaled_weights]
        if missing:
            raise ValueError(
                f"The adapter {self._source!r} of `init_weights` changes {len(missing)} layers that the config does "
                f"not target (the first: {missing[0]!r}), expected all of them; target them, or merge that adapter "
                "first."
            )
        if config.selection is None:
            if config.ratio not in (SGRQConfig.ratio, self._config.ratio):
                logger.warning(
                    "The ratio %s is not used: the adapter starts from %r and selects what that one does, with a "
                    "ratio of %s. To tune another part, merge that adapter first.",
                    config.ratio,
                    self._source,
                    self._config.ratio,
                )
            config.ratio, config.ratio_pattern = self._config.ratio, dict(self._config.ratio_pattern)
            config.criterion = self._config.criterion
        config.zero_points = config.zero_points or self._config.zero_points
        selection = dict(config.selection or {})
        for name, delta in self._deltas.items():
            scaled_weight = scaled_weights[name]
            same_groups = scaled_weight.quantized or config.group_size == self._config.group_size
            if not (delta.fits(scaled_weight) and same_groups):
                raise ValueError(
                    f"The adapter {self._source!r} of `init_weights` has {tuple(delta.values.shape)} deltas for "
                    f"layer {name!r}, found {scaled_weight.selectable} groups to select from there and a group size "
                    f"of {config.group_size}; give the config the adapter's group size ({self._config.group_size}), "
                    "and the model it was trained on."
                )
            if name in selection:
                self._check_selected(name, delta, selection[name], scaled_weight)
            else:
                selection[name] = encode_mask(delta.units, scaled_weight.selectable)
        config.selection = selection
        if self._config.base_fingerprint:
            config.base_fingerprint = {**(config.base_fingerprint or {}), **self._config.base_fingerprint}

    def _check_selected(self, name: str, delta: StoredDelta, mask: str, scaled_weight: ScaledWeight) -> None:
        changed = delta.units[delta.values.ne(0).any(1 - scaled_weight.unit.dim)]
        lost = ~torch.isin(changed, decode_mask(mask, scaled_weight.selectable))
        if lost.any():
            raise ValueError(
                f"The config selects other groups of layer {name!r} than the adapter {self._source!r} of "
                f"`init_weights` changes ({int(lost.sum())} of them would be lost), expected all of these; leave "
                "`selection` out, or merge that adapter first."
            )

    @torch.no_grad()
    def write(self, model: nn.Module, adapter_name: str) -> None:
        """Writes the deltas into a model's adapter of that name, which selects at least what the source does."""
        modules = dict(model.named_modules())
        for name, stored in self._deltas.items():
            layer = modules[name]
            if not isinstance(layer, SGRQLinear) or layer.delta(adapter_name).weight.is_meta:
                continue  # on the meta device: loaded into later
            delta = layer.delta(adapter_name)
            rows = torch.isin(stored.units, delta.units.cpu())
            places = torch.searchsorted(delta.units.cpu(), stored.units[rows])
            dim = layer.scaled_weight.unit.dim
            kept = stored.values.index_select(dim, rows.nonzero().flatten()).to(delta.weight.device)
            delta.weight.index_copy_(dim, places.to(delta.weight.device), kept)
            if stored.zero_points is not None and adapter_name in layer.sgrq_zero_points:
                layer._zero_points(adapter_name).weight.copy_(stored.zero_points)
