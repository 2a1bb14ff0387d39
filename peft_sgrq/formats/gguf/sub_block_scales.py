"""The scales of a packed matrix, one for each sub-block of its super-blocks.

`S[j] = d * scale[j]` and `M[j] = -m * minimum[j]` with half floats `d`, `m` and integers of 4 to 8 bits. So changed
scales are rounded together, a super-block at a time: to a new `d` and new integers. Three ways are tried, and the one
that misses the wanted scales least is taken:

* `d` as it is,
* `d` that gives the largest scale the integer it has,
* `d` that gives the largest scale the largest integer, as llama.cpp's quantizer chooses it.

Scales that are to stay must stay, bit for bit, which leaves the first way where some do. All of this depends on the
stored bytes and the scales alone, so training, merging in memory and merging on files round alike.
"""

from __future__ import annotations

from functools import cached_property

import torch

from peft_sgrq.formats.gguf.block_scales import BlockScales, Factors, round_half
from peft_sgrq.formats.gguf.blocks import BlockType, write_half
from peft_sgrq.formats.gguf.sub_scales import Sub, SubScales
from peft_sgrq.formats.scale_arithmetic import rescaled_offset
from peft_sgrq.formats.scale_matrix import split_zero_points

_NEVER = 1e20  # missed this many times as much, one part in 2^40 of the largest scale is more than any error there is
_LARGE = 1e38  # divided by this a scale rounds to zero


class SubBlockScales(BlockScales):
    """One scale for each sub-block.

    Args:
        kind (`BlockType`): A type with scales of sub-blocks.
        packed (`torch.Tensor`): The matrix as the file has it, uint8 `[N, bytes of a row]`.
    """

    def __init__(self, kind: BlockType, packed: torch.Tensor) -> None:
        super().__init__(kind, packed)
        if kind.sub is None:
            raise ValueError(f"{kind.name} has no scales of sub-blocks, expected a K-quant or IQ4_XS.")
        self._stored: SubScales = kind.sub

    @property
    def group_size(self) -> int:
        return self._stored.size

    @property
    def movable_zero_points(self) -> bool:
        return self.kind.offset_at is not None

    @property
    def scale_bytes(self) -> list[int]:
        at = self._stored.at
        return sorted({*self.kind.scale_bytes, *range(at.start, at.stop)})

    @cached_property
    def _sub(self) -> Sub:
        return self._stored.read(self.blocks[:, self._stored.at])

    def scales(self) -> torch.Tensor:
        return (self._scale * self._sub.scales.float()).view(self.rows, -1)

    def offsets(self) -> torch.Tensor | None:
        offset, minimums = self._offset, self._sub.minimums
        return None if offset is None or minimums is None else -(offset * minimums.float()).view(self.rows, -1)

    def round(self, scales: torch.Tensor) -> torch.Tensor:
        wanted = scales.reshape(self.blocks.shape[0], -1)  # (blocks, s)
        stored = self._stored
        scale, integers = _nearest(wanted, self._scale, self._sub.scales, stored.lowest, stored.highest)
        return _by_block(scale, integers).view(self.rows, -1)

    def _split_offsets(
        self, scales: torch.Tensor, moves: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The offsets that go with other scales, without their sign, as `_nearest` returns them."""
        offset, minimums = self._offset, self._sub.minimums
        if offset is None or minimums is None:
            return None
        before = offset * minimums.float()  # (blocks, s)
        opposite = None if moves is None else -moves.reshape(before.shape)
        original = self.scales().view(before.shape)
        wanted = rescaled_offset(before, scales.reshape(before.shape), original, opposite)
        return _nearest(wanted, offset, minimums, 0, self._stored.highest)

    def changed_offsets(self, scales: torch.Tensor, moves: torch.Tensor | None = None) -> torch.Tensor | None:
        split = self._split_offsets(scales, moves)
        return None if split is None else _by_block(-split[0], split[1]).view(self.rows, -1)

    def factors(self, scales: torch.Tensor, offsets: torch.Tensor | None) -> Factors:
        count = self.blocks.shape[0]
        return Factors(scales.reshape(count, -1), None if offsets is None else offsets.reshape(count, -1))

    def with_scales(self, scales: torch.Tensor) -> torch.Tensor:
        scales, moves = split_zero_points(scales)
        kind, blocks = self.kind, self.blocks.clone()
        stored = self._stored
        scale, integers = _exactly(scales.reshape(blocks.shape[0], -1), self._scale, stored.lowest, stored.highest)
        # Bytes that say the same stay: a scale of zero times any integer.
        sub = self._sub
        kept = (scales.reshape(integers.shape) == self.scales().view(integers.shape)).all(1, keepdim=True)
        scale = torch.where(kept, self._scale, scale)
        integers = torch.where(kept, sub.scales.float(), integers)
        write_half(blocks, kind.scale_at, scale)
        minimums = sub.minimums
        split = self._split_offsets(scales, moves)
        if split is not None and kind.offset_at is not None:
            write_half(blocks, kind.offset_at, split[0].reshape(-1, 1))
            minimums = split[1].t().short()
        blocks[:, stored.at] = stored.write(Sub(integers.short(), minimums))
        return blocks.view(self.rows, -1)


def _nearest(
    wanted: torch.Tensor, base: torch.Tensor, integers: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The half float and the integers whose products are nearest to what is wanted.

    Args:
        wanted (`torch.Tensor`): float32 `[blocks, s]`.
        base (`torch.Tensor`): The half float that is stored, float32 `[blocks, 1]`.
        integers (`torch.Tensor`): The integers that are stored, of any dtype, `[blocks, s]`.
        lowest, highest (`int`): What an integer may be.

    Returns:
        The half floats, float32 `[1, blocks]`, and the integers, float32 `[s, blocks]`.
    """
    # Sub-blocks first from here on: what there is once a super-block meets long rows then, which is fast. So are sums
    # and products of floats in place of comparisons and `torch.where`, which a CPU does one number at a time.
    wanted, base = wanted.t().contiguous(), base.t()  # (s, blocks), (1, blocks)
    integers = integers.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # (s, blocks)
    largest, level, finite = _largest(wanted, integers)
    end = highest - (level < 0) * (highest - lowest) if lowest < 0 else torch.full_like(level, highest)
    tried = round_half((largest / torch.cat((level, end))).nan_to_num_(0.0, 0.0, 0.0))  # (2, blocks)
    # Errors are in parts of the largest scale, lest they underflow. A scale that is to stay must not be missed.
    stays = (base * integers).eq_(wanted)
    weight = stays.mul_(_NEVER).add_(1).div_(largest + (largest == 0))
    best, least = base, _error(wanted, base, weight, lowest, highest)
    for scale in tried.split(1):
        error = _error(wanted, scale, weight, lowest, highest)
        best = torch.where(error < least, scale, best)  # never a scale of zero
        least = torch.minimum(error, least)
    found = _multiples(wanted, best, lowest, highest)
    found += (best == 0).float() * integers  # bytes that say the same stay
    return best * finite, found


def _multiples(wanted: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """The integers that times a scale are nearest to what is wanted, `[s, n]`; zero where the scale is."""
    return (wanted / (scale + (scale == 0).float() * _LARGE)).round_().clamp_(lowest, highest)


def _error(wanted: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """The squares of what the nearest multiples of a scale miss, weighted and added up, `[s, n]` to `[1, n]`."""
    missed = _multiples(wanted, scale, lowest, highest).mul_(scale).sub_(wanted)
    total = torch.zeros_like(scale)
    for row in missed.mul_(weight).square_():  # one after the other: the sum has the same bits everywhere
        total += row
    return total


def _by_block(scale: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """The products of what `_nearest` returns, float32 `[blocks, s]`."""
    return (scale * integers).t().contiguous()


def _largest(wanted: torch.Tensor, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest scale of each super-block, the sign aside and the first of several, its integer, and one.

    All `[1, n]`. In place of one there is NaN where a scale is NaN or infinite: that makes no number then, for checks
    to find it.
    """
    count = len(wanted)
    size = wanted.abs()
    places = torch.arange(count, 0, -1, dtype=torch.float32, device=wanted.device).unsqueeze(1)  # (s, 1)
    bound = size.amax(0, keepdim=True)
    first = size.eq_(bound).mul_(places).amax(0, keepdim=True)
    place = (count - first).clamp_(max=count - 1).long()  # none is the largest where one is NaN
    return wanted.gather(0, place), integers.gather(0, place), (bound - bound).add_(1)


def _exactly(made: torch.Tensor, base: torch.Tensor, lowest: int, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A half float and integers that have given products, which `_nearest` made; as that returns them."""
    position = made.abs().argmax(1, keepdim=True)
    largest = made.gather(1, position)
    scale, integers = base.clone(), torch.zeros_like(made)
    left = torch.ones(made.shape[0], dtype=torch.bool, device=made.device)
    # The largest product is some integer times the half float: at one of them all products are integers.
    for divisor in (None, *range(highest, 0, -1), *range(lowest, 0)):
        tried = base[left] if divisor is None else round_half(largest[left] / divisor)
        found = torch.where(tried == 0, 0.0, (made[left] / tried).round())
        right = ((tried * found == made[left]) & (found >= lowest) & (found <= highest)).all(1)
        rows = left.nonzero().squeeze(1)[right]
        scale[rows], integers[rows] = tried[right], found[right]
        left[rows] = False
        if not bool(left.any()):
            return scale, integers
    raise RuntimeError(f"{int(left.sum())} super-blocks have scales that no half float times integers gives.")


def scales_of(kind: BlockType, packed: torch.Tensor, sub_blocks: bool = True) -> BlockScales:
    """The scales of a packed matrix: of sub-blocks where it has some and they are wanted, else of blocks.

    Args:
        kind (`BlockType`): The type of the blocks.
        packed (`torch.Tensor`): The matrix, uint8 `[N, bytes of a row]`.
        sub_blocks (`bool`): Whether sub-blocks have scales of their own.
    """
    return (SubBlockScales if sub_blocks and kind.sub is not None else BlockScales)(kind, packed)
