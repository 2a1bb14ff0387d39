"""What a rotation of a model was: chosen where, with which errors, and how much the model changed."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field

from peft_sgrq.files.described import read_described, write_described
from peft_sgrq.rotation.errors import RotationError


@dataclass
class Rotations:
    """What [`rotate`] did.

    Attributes:
        seed (`int`): The seed of the random signs.
        scheme (`str`): The bits that errors were measured with.
        chosen (`dict[str, list[str]]`): Rotation -> the blocks that have it; R1 is of the whole model.
        errors (`list[RotationError]`): What was measured, by block and rotation; none without data.
        left_out (`dict[str, list[str]]`): Rotation -> the blocks that cannot have it: queries, keys and values are one
            layer, or no Hadamard matrix has the size of a head.
        untied_weights (`int`): The weights that the checkpoint has more, as the output head is one of its own now.
        difference (`float`): By how much logits changed, relative to how much they vary: the rounding of the dtype.
    """

    seed: int
    scheme: str
    chosen: dict[str, list[str]]
    errors: list[RotationError] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    untied_weights: int = 0
    difference: float = 0.0

    def __str__(self) -> str:
        lines = [f"{name}: {len(blocks)} blocks" for name, blocks in self.chosen.items() if name != "R1"]
        lines.insert(0, f"seed {self.seed}, {self.scheme}" + (", R1: all" if "R1" in self.chosen else ""))
        lines += [f"{name} left out of {len(blocks)} blocks" for name, blocks in self.left_out.items()]
        if self.untied_weights:
            lines.append(f"{self.untied_weights:,} weights more: the output head is no longer the embedding")
        lines.append(f"logits changed by {self.difference:.2g} of their spread")
        for error in self.errors:
            word = "rotated" if error.block in self.chosen.get(error.rotation, []) else "left"
            lines.append(f"{error.block} {error.rotation}: error {error.without:.4g} -> {error.rotated:.4g}, {word}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON."""
        write_described(path, "rotations", asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rotations:
        """Reads what `save` or `peft-sgrq rotate` wrote.

        Raises:
            ValueError: If the file holds no rotations.
            OSError: If there is none.
        """
        fields = read_described(path, "rotations")
        fields["errors"] = [RotationError(**error) for error in fields["errors"]]
        return cls(**fields)
