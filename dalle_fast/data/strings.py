"""Many short strings in two arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

_AT_ONCE = 1 << 16


class Strings(Sequence):
    """A list of strings that takes their bytes and eight more of each, where Python's objects take 60 more: of the names
    and captions of millions of pictures, gigabytes. Processes that are forked share it, as nothing counts references in it.

    Args:
        data: (bytes,) uint8, the strings in UTF-8, one behind the other; what is behind the last one is not looked at.
        ends: (number of strings,) int64, where each ends. Both may be mapped from a file.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self._data, self._ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        data, lengths, some = bytearray(), [], []
        for string in strings:
            some.append(string.encode("utf-8", "surrogateescape"))  # a file's name need not be UTF-8
            if len(some) == _AT_ONCE:
                data += b"".join(some)
                lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
                some = []
        data += b"".join(some)
        lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
        return cls(np.frombuffer(data, np.uint8), np.concatenate(lengths).cumsum())

    @classmethod
    def joined(cls, parts: Sequence[Strings]) -> Strings:
        """The strings of all parts, one part behind the other."""
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
        data = np.concatenate([part.data for part in parts]) if parts else np.zeros(0, np.uint8)
        return cls(data, lengths.cumsum())

    @property
    def data(self) -> np.ndarray:
        """The bytes of all strings."""
        return self._data[: self._ends[-1] if len(self) else 0]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._ends, prepend=0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, the number of strings, got {index}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return self._data[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __eq__(self, other):
        if isinstance(other, Strings):
            return np.array_equal(self.lengths, other.lengths) and np.array_equal(self.data, other.data)
        if isinstance(other, list):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None
