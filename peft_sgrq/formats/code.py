"""Python code that quantizes a model while or after it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Code:
    """A piece of code.

    Attributes:
        names (`Mapping[str, set[str]]`): Library -> the names imported from it.
        argument (`str`): The `quantization_config` of `from_pretrained`, if there is one.
        statements (`list[str]`): What is to be done with the loaded model, named `base`.
    """

    names: Mapping[str, set[str]] = field(default_factory=dict)
    argument: str = ""
    statements: list[str] = field(default_factory=list)

    def then(self, names: Mapping[str, set[str]], statement: str) -> Code:
        """This code and one more statement, with what it imports."""
        merged = {key: self.names.get(key, set()) | names.get(key, set()) for key in (*self.names, *names)}
        return Code(merged, self.argument, [*self.statements, statement])

    def __str__(self) -> str:
        return self.argument or "; ".join(self.statements)
