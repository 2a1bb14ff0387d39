"""Python code that loads a model, or quantizes it while or after it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Code:
    """A piece of code.

    Attributes:
        names (`Mapping[str, set[str]]`): Library -> the names imported from it.
        expression (`str`): What loads the model; or the `quantization_config` of `from_pretrained`, if there is one.
        statements (`list[str]`): What is to be done with the loaded model, named `base`.
    """

    names: Mapping[str, set[str]] = field(default_factory=dict)
    expression: str = ""
    statements: list[str] = field(default_factory=list)

    def then(self, names: Mapping[str, set[str]], statement: str) -> Code:
        """This code and one more statement, with what it imports."""
        merged = {key: self.names.get(key, set()) | names.get(key, set()) for key in (*self.names, *names)}
        return Code(merged, self.expression, [*self.statements, statement])

    def __str__(self) -> str:
        return self.expression or "; ".join(self.statements)

    @property
    def imports(self) -> list[str]:
        """Lines that import what the rest names."""
        return [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(self.names.items())]

    def block(self) -> str:
        """Lines that set `base`, imports first."""
        return "\n".join([*self.imports, "", f"base = {self.expression}", *self.statements])

    def clause(self) -> str:
        """The same within a sentence, after "load the base with"; names of transformers are not imported."""
        others = [line for line in self.imports if not line.startswith("from transformers ")]
        if not self.statements:
            return self.expression
        return f"{self.expression} as `base`, and then run `{'; '.join([*others, *self.statements])}`"
