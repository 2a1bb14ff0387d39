"""Bit masks of selected groups, as tensors for files and as hexadecimal strings for the config."""

from __future__ import annotations

import torch

_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack_mask(units: torch.Tensor, selectable: int) -> torch.Tensor:
    """Packs indices into bits, the first group the highest bit of the first byte.

    Args:
        units (`torch.Tensor`): Indices of the selected groups, int64 `[n]`.
        selectable (`int`): How many groups there are.

    Returns:
        `torch.Tensor`: uint8 `[ceil(selectable / 8)]`.
    """
    bits = torch.zeros(-(-selectable // 8) * 8, dtype=torch.uint8)
    bits[units.cpu()] = 1
    return (bits.view(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the set bits of a packed mask, ascending, int64 on the CPU."""
    return (mask.cpu().unsqueeze(1) & _BITS).flatten().nonzero().flatten()


def mask_of(units: torch.Tensor, selectable: int) -> torch.Tensor:
    """Zeros, and ones at the groups: float32 `[selectable]`, on the device of the indices."""
    mask = torch.zeros(selectable, device=units.device)
    mask[units] = 1
    return mask


def read_mask(mask: torch.Tensor, selectable: int) -> torch.Tensor:
    """Indices of the groups a mask selects, packed to bits or not, ascending, int64 on the CPU.

    Args:
        mask (`torch.Tensor`): As `pack_mask` or `mask_of` returns it, of any dtype: state dicts are cast and averaged.
        selectable (`int`): How many groups there are.

    Raises:
        ValueError: If it is not a mask over `selectable` groups.
    """
    values = mask.to("cpu", torch.float32)
    rounded = values.round()
    # One group, packed, is the byte 128.
    packed = values.shape == (-(-selectable // 8),) and (selectable > 1 or bool((rounded > 1).any()))
    highest = 255 if packed else 1
    if not packed and values.shape != (selectable,):
        raise ValueError(f"it has shape {tuple(mask.shape)}, expected a mask over {selectable} groups")
    if not bool(((values - rounded).abs() <= 0.25).all() and ((rounded >= 0) & (rounded <= highest)).all()):
        raise ValueError("it holds values that are no mask, expected zeros and ones, or bytes of them")
    units = unpack_mask(rounded.to(torch.uint8)) if packed else rounded.nonzero().flatten()
    if len(units) and int(units[-1]) >= selectable:
        raise ValueError(f"it selects group {int(units[-1])}, expected less than {selectable}")
    return units


def encode_mask(units: torch.Tensor, selectable: int) -> str:
    """The packed mask as a hexadecimal string."""
    return bytes(pack_mask(units, selectable).tolist()).hex()


def decode_mask(text: str, selectable: int, none: bool = False) -> torch.Tensor:
    """Indices of the groups a hexadecimal mask selects, ascending, int64; with `none` it may select none.

    Raises:
        ValueError: If the mask is not one over `selectable` groups, or selects none. The sentence is a clause about
            the layer, for the caller to put the layer's name in front of.
    """
    expected = -(-selectable // 8)
    mask = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
    units = unpack_mask(mask)
    if len(mask) != expected or not (none or len(units)) or (len(units) and int(units[-1]) >= selectable):
        raise ValueError(
            f"its selection {text!r} is not a mask over {selectable} groups (expected {expected} bytes with at least "
            "one bit set); the adapter was made for a layer of another shape or group size, load the base it names"
        )
    return units
