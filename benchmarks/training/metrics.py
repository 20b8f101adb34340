"""Metrics of a training run beside its loss: TensorBoard scalars and peak memory."""

import math
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def reset_peak_memory() -> None:
    """Reset the peak of the CUDA allocator, or of this process's resident memory on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # Elsewhere than on Linux the peak stays that of the process so far.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak in bytes since the last reset (allocated on CUDA, resident on CPU)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Scalars:
    """TensorBoard writer of one run; without a folder it does nothing."""

    def __init__(self, folder: Path | None, *, first_step: int = 0) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            # A resumed run goes on from its checkpoint: drop what was logged beyond it.
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` at ``step``."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the recorded scalars to disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self, hparams: dict[str, Any] | None = None, **metrics: float) -> None:
        """Record the hyperparameters with the final metrics, and close the writer."""
        if self._writer is not None:
            if hparams is not None:
                simple = (bool, int, float, str)
                plain = {k: v if isinstance(v, simple) else str(v) for k, v in hparams.items()}
                self._writer.add_hparams(plain, metrics, run_name=".")
            self._writer.close()


def perplexity(loss: float | None) -> float:
    """Return exp(loss), or infinity for a run that diverged or whose loss exceeds 700."""
    return math.inf if loss is None or loss > 700 else math.exp(loss)
