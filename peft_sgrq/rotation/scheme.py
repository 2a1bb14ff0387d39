"""What names mean: rotations, and "W4A8KV8", bits of weights, activations and cache, for compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?")
ROTATIONS = ("R1", "R2", "R3", "R4")
BIT_CRITERIA = ("fisher", "measured", "output")
WIDTHS = range(2, 9)
FULL = 16  # bits of what is not quantized


@dataclass(frozen=True)
class Scheme:
    """How many bits the parts of a model get, and how they are rounded.

    Attributes:
        weights (`int`): Bits of weights, 2 to 8.
        activations (`int`): Bits of the inputs of linear layers, one scale a token; 16 leaves them as they are.
        cache (`int`): Bits of keys and values, one scale a token and head; 16 leaves them as they are.
        group_size (`int`): Columns of a weight that share a scale. A layer whose columns are no multiple of it gets
            one scale a row.
        symmetric (`bool`): Codes of activations and of the cache around zero, without zero points. Those of weights
            always are: transformers 5.23 does not load packed zero points.
    """

    weights: int
    activations: int = FULL
    cache: int = FULL
    group_size: int = 64
    symmetric: bool = True

    @property
    def name(self) -> str:
        """As [`parse_scheme`] reads it."""
        return f"W{self.weights}A{self.activations}" + (f"KV{self.cache}" if self.cache < FULL else "")

    def by_row(self, columns: int) -> bool:
        """Whether a weight with so many columns gets one scale a row."""
        return columns % self.group_size != 0

    def weight_args(self, bits: int, by_row: bool) -> Any:
        """compressed-tensors' `QuantizationArgs` of a weight at some bits."""
        from compressed_tensors.quantization import QuantizationArgs

        return QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=True,
            strategy="channel" if by_row else "group",
            group_size=None if by_row else self.group_size,
        )

    def config(
        self, widths: Mapping[str, int], by_row: Collection[str], ignored: Collection[str], head_dim: int | None = None
    ) -> Any:
        """compressed-tensors' `QuantizationConfig`: a group of layers for each width and kind of scales.

        Args:
            widths (`Mapping[str, int]`): Module name -> bits of the weight.
            by_row (`Collection[str]`): Those with one scale a row.
            ignored (`Collection[str]`): Linear layers that stay.
            head_dim (`int` or `None`): That of attention, where the cache is quantized.
        """
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        groups: dict[tuple[int, bool], list[str]] = {}
        for name, width in widths.items():
            groups.setdefault((width, name in by_row), []).append(name)
        schemes = {
            f"w{width}" + ("_rows" if rows else ""): QuantizationScheme(
                targets=["Linear"] if len(groups) == 1 else names,
                weights=self.weight_args(width, rows),
                input_activations=self.activation_args(),
                format="pack-quantized",
            )
            for (width, rows), names in sorted(groups.items())
        }
        cache = None if head_dim is None else self.cache_args(head_dim)
        return QuantizationConfig(config_groups=schemes, ignore=sorted(ignored), kv_cache_scheme=cache)

    def activation_args(self) -> Any:
        """Those of the inputs of linear layers; `None` if they are not quantized."""
        return self._dynamic_args(self.activations, "token")

    def cache_args(self, head_dim: int) -> Any:
        """Those of keys and values; `None` if they are not quantized.

        A group of one head: the strategy `token` has one scale for all positions of a head, which is not causal.
        """
        return self._dynamic_args(self.cache, "group", head_dim)

    def _dynamic_args(self, bits: int, strategy: str, group_size: int | None = None) -> Any:
        from compressed_tensors.quantization import QuantizationArgs

        if bits >= FULL:
            return None
        return QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=self.symmetric,
            strategy=strategy,
            group_size=group_size,
            dynamic=True,
        )


def parse_scheme(scheme: str | Scheme, group_size: int = 64, symmetric: bool = True) -> Scheme:
    """A scheme from its name, such as "W4A16", "W4A8KV8" or "W4A4KV4".

    Raises:
        ValueError: If the name or a width is none that there is.
        TypeError: If it is no name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"`scheme` is a {type(scheme).__name__}, expected a name such as 'W4A8KV8'.")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"`group_size` is {group_size!r}, expected a positive whole number; 64 and 128 are usual.")
    if not isinstance(symmetric, bool):
        raise TypeError(f"`symmetric` is {symmetric!r}, expected True or False.")
    match = _NAME.fullmatch(scheme.upper())
    if match is None:
        raise ValueError(
            f"`scheme` is {scheme!r}, expected weights, activations and KV cache in bits, as in 'W4A16', 'W4A8KV8' or "
            "'W4A4KV4'; 16 leaves activations as they are."
        )
    weights, activations, cache = (FULL if bits is None else int(bits) for bits in match.groups())
    if weights not in WIDTHS or any(bits not in (*WIDTHS, FULL) for bits in (activations, cache)):
        raise ValueError(
            f"`scheme` is {scheme!r}, expected weights of {WIDTHS[0]} to {WIDTHS[-1]} bits, and activations and KV "
            f"cache of as many or {FULL}; choose other widths."
        )
    return Scheme(weights, activations, cache, group_size, symmetric)


def require_compressed_tensors() -> None:
    """Raises an ImportError that says what to install, if compressed-tensors is missing."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "compressed-tensors is not installed, which rotates and quantizes; `pip install "
            "'peft-sgrq[compressed-tensors]'`."
        ) from error
