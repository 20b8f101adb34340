"""Training batches by step, and evaluation windows."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Training batches indexed by step; a batch depends on its step alone, so there is no state.

    Windows of `seq_len` inputs and the label after each do not overlap in their inputs. Each epoch
    has its own order, drawn from (seed, epoch), and drops the last windows that fill no batch.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int) -> None:
        windows = _windows(tokens, batch_size, seq_len)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if windows < batch_size:
            raise ValueError(
                f"the split has {windows} windows of seq_len {seq_len}, too few for batch_size "
                f"{batch_size}; take a smaller batch or more text"
            )
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = tokens
        self._windows = windows
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._windows // self.batch_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels [batch_size, seq_len] of a step, counted over all epochs."""
        if step < 0:
            raise IndexError(f"step must be at least 0, got {step}")
        epoch, batch = divmod(step, len(self))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self._windows)
            self._order = (epoch, order)
        rows = self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        return _gather(self._tokens, rows, self.seq_len)


def iterate_eval(
    tokens: np.ndarray, batch_size: int, seq_len: int, max_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of all windows of a split in order; the last batch may have fewer rows.

    `max_tokens` limits the number of windows; they are spread evenly over the split, since its
    first documents need not be representative. An incomplete last window is dropped.
    """
    windows = _windows(tokens, batch_size, seq_len)
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(f"max_tokens {max_tokens} is less than one window of {seq_len}")
    count = windows if max_tokens is None else min(windows, max_tokens // seq_len)
    chosen = np.arange(count) * windows // count
    return (
        _gather(tokens, chosen[first : first + batch_size], seq_len)
        for first in range(0, count, batch_size)
    )


def _windows(tokens: np.ndarray, batch_size: int, seq_len: int) -> int:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    windows = (len(tokens) - 1) // seq_len
    if windows < 1:
        raise ValueError(
            f"the split has {len(tokens)} tokens, too few for one window of seq_len {seq_len} and "
            "its last label; take a shorter seq_len or more text"
        )
    return windows


def _gather(tokens: np.ndarray, rows: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    starts = rows.tolist()
    block = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        block[row] = tokens[start * seq_len : (start + 1) * seq_len + 1]
    both = torch.from_numpy(block)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
