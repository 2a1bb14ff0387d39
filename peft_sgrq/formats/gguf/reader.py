"""Reading the values of a GGUF header, one after the other."""

from __future__ import annotations

import mmap
import struct
from typing import Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, _ARRAY = 8, 9


class Reader:
    """Reads numbers and strings one after the other, and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.size = data, 0, len(data)

    def skip(self, count: int) -> int:
        start = self.position
        if count < 0 or start + count > self.size:
            raise ValueError(f"a header that goes on at byte {self.size}")
        self.position = start + count
        return start

    def numbers(self, letters: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + letters)
        return layout.unpack_from(self.data, self.skip(layout.size))

    def string(self) -> str:
        (length,) = self.numbers("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        item, count = self.numbers("IQ")
        if item in _NUMBERS:
            self.skip(count * struct.calcsize("<" + _NUMBERS[item]))
        elif item == STRING:
            for _ in range(count):
                (length,) = self.numbers("Q")
                self.skip(length)
        else:
            for _ in range(count):
                self.value(item)
        return item, count  # the items are not read
