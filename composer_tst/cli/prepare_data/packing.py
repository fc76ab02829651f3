"""Documents to rows: joined by end-of-text and cut to length, a document running on into the next row."""

import numpy as np
from numpy.typing import NDArray


class Packer:
    """Joins token arrays and hands them back as full rows.

    Args:
        seq_len: the tokens of a row, L.
    """

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.held: list[NDArray[np.int32]] = []
        self.held_tokens = 0

    def add(self, tokens: NDArray[np.int32]) -> None:
        """Append tokens[T] to the stream."""
        self.held.append(tokens)
        self.held_tokens += len(tokens)

    def rows(self) -> NDArray[np.int32]:
        """Take the full rows[N, L] out, N >= 0; fewer than L tokens stay held."""
        count = self.held_tokens // self.seq_len
        if count == 0:
            return np.empty((0, self.seq_len), np.int32)
        stream = np.concatenate(self.held)
        whole = count * self.seq_len
        # A copy, because a view would keep the whole stream in memory.
        self.held = [stream[whole:].copy()]
        self.held_tokens -= whole
        return stream[:whole].reshape(count, self.seq_len)
