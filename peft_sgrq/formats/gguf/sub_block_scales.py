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

import torch

from peft_sgrq.formats.gguf.block_scales import BlockScales, Factors, round_half
from peft_sgrq.formats.gguf.blocks import BlockType, write_half
from peft_sgrq.formats.gguf.sub_scales import Sub, SubScales
from peft_sgrq.formats.scale_arithmetic import rescaled_offset
from peft_sgrq.formats.scale_matrix import split_zero_points


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

    def _sub(self) -> Sub:
        return self._stored.read(self.blocks[:, self._stored.at])

    def scales(self) -> torch.Tensor:
        return (self._halves()[0] * self._sub().scales).view(self.rows, -1)

    def offsets(self) -> torch.Tensor | None:
        offset, minimums = self._halves()[1], self._sub().minimums
        return None if offset is None or minimums is None else -(offset * minimums).view(self.rows, -1)

    def round(self, scales: torch.Tensor) -> torch.Tensor:
        wanted = scales.reshape(self.blocks.shape[0], -1)  # (blocks, s)
        scale, integers = self._split_scales(wanted)
        return (scale * integers).view(self.rows, -1)

    def _split_scales(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sub = self._sub().scales.float()
        return _nearest(wanted, self._halves()[0], sub, self._stored.lowest, self._stored.highest)

    def _split_offsets(
        self, scales: torch.Tensor, moves: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        offset, minimums = self._halves()[1], self._sub().minimums
        if offset is None or minimums is None:
            return None
        before = offset * minimums  # (blocks, s), the offset without its sign
        scale = self._halves()[0] * self._sub().scales
        opposite = None if moves is None else -moves.reshape(before.shape)
        wanted = rescaled_offset(before, scales.reshape(before.shape), scale, opposite)
        return _nearest(wanted, offset, minimums.float(), 0, self._stored.highest)

    def changed_offsets(self, scales: torch.Tensor, moves: torch.Tensor | None = None) -> torch.Tensor | None:
        split = self._split_offsets(scales, moves)
        return None if split is None else -(split[0] * split[1]).view(self.rows, -1)

    def factors(self, scales: torch.Tensor, offsets: torch.Tensor | None) -> Factors:
        count = self.blocks.shape[0]
        return Factors(scales.reshape(count, -1), None if offsets is None else offsets.reshape(count, -1))

    def with_scales(self, scales: torch.Tensor) -> torch.Tensor:
        scales, moves = split_zero_points(scales)
        kind, blocks = self.kind, self.blocks.clone()
        scale, integers = _exactly(
            scales.reshape(blocks.shape[0], -1), self._halves()[0], self._stored.lowest, self._stored.highest
        )
        # Bytes that say the same stay: a scale of zero times any integer.
        sub = self._sub()
        kept = (scales.reshape(integers.shape) == self.scales().view(integers.shape)).all(1, keepdim=True)
        scale = torch.where(kept, self._halves()[0], scale)
        integers = torch.where(kept, sub.scales.float(), integers)
        write_half(blocks, kind.scale_at, scale)
        minimums = sub.minimums
        split = self._split_offsets(scales, moves)
        if split is not None and kind.offset_at is not None:
            write_half(blocks, kind.offset_at, split[0])
            minimums = split[1].short()
        blocks[:, self._stored.at] = self._stored.write(Sub(integers.short(), minimums))
        return blocks.view(self.rows, -1)


def _nearest(
    wanted: torch.Tensor, base: torch.Tensor, integers: torch.Tensor, lowest: int, highest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The half float and the integers whose products are nearest to what is wanted.

    Args:
        wanted (`torch.Tensor`): float32 `[blocks, s]`.
        base (`torch.Tensor`): The half float that is stored, float32 `[blocks, 1]`.
        integers (`torch.Tensor`): The integers that are stored, float32 `[blocks, s]`.
        lowest, highest (`int`): What an integer may be.

    Returns:
        The half floats, float32 `[blocks, 1]`, and the integers, float32 `[blocks, s]`.
    """
    # Sub-blocks first from here on: what there is once a super-block meets long rows then, which is fast. So are sums
    # and products in place of `torch.where`, whose branches a processor cannot foresee.
    wanted, base, integers = wanted.t().contiguous(), base.t(), integers.t().contiguous()  # (s, blocks), (1, blocks)
    stays = (base * integers).eq_(wanted)
    largest, level = _largest(wanted, integers)
    unit = largest + (largest == 0)
    end = highest - (level < 0) * (highest - lowest) if lowest < 0 else highest
    best = base
    least = _error(_missed(wanted, base, lowest, highest), unit)
    for divisor in (level, end):
        scale = round_half((largest / divisor).nan_to_num_(0.0, 0.0, 0.0))
        missed = _missed(wanted, scale, lowest, highest)
        moved = (missed * stays).abs_().amax(0, keepdim=True)  # none with the scale that is stored
        error = _error(missed, unit)
        better = (error < least) & (moved == 0)  # never with a scale of zero
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    zero = best == 0
    found = (wanted / best.masked_fill(zero, torch.inf)).round_().clamp_(lowest, highest)
    found += zero * integers  # bytes that say the same stay
    # What is NaN or infinite is no number then, for checks to find it.
    return best.reshape(-1, 1), found.add_(wanted - wanted).t().contiguous()


def _missed(wanted: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """By how much the nearest multiples of a scale miss what is wanted, `[s, n]`; zero where that is NaN."""
    missed = (wanted / scale).round_().clamp_(lowest, highest).mul_(scale).sub_(wanted)
    return missed.nan_to_num_(0.0)  # none is missed where both are zero


def _largest(wanted: torch.Tensor, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the largest scales of each super-block, signs aside, and its integer; `[s, n]` to `[1, n]`."""
    count = len(wanted)
    size = wanted.abs()
    places = torch.arange(count, 0, -1, device=wanted.device).unsqueeze(1)  # (s, 1)
    first = (size.eq_(size.amax(0, keepdim=True)) * places).amax(0, keepdim=True)
    place = (count - first).clamp_(max=count - 1).long()  # none is the largest where one is NaN
    return wanted.gather(0, place), integers.gather(0, place)


def _error(missed: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The sum of squares, `[s, n]` to `[1, n]`, in parts of a unit, lest they underflow. Writes to `missed`."""
    error = torch.zeros_like(unit)
    for row in missed.div_(unit).square_():  # one after the other: the sum has the same bits everywhere
        error += row
    return error


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
