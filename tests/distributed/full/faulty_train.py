"""`python -m benchmarks ...` in a process of torchrun, some of whose starts end with a fault.

`torchrun ... faulty_train.py OUT FAULTS COMMAND ...`: OUT is the run's folder. FAULTS is JSON, for
each start of the processes `[place, rank, count]`; later starts are left alone. Places are those of
`parallel_runs.arm`, armed when the run has been resumed, and `leave`: before its step `count` the
process has torchrun end all of them with SIGTERM. OUT-starts.txt gets the step of each start, and
OUT-faults.txt the place of each fault, as it comes.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from parallel_runs import arm, weights_kept
from tiny_benchmarks import TINY

from benchmarks.training.checkpoint import Checkpoints
from benchmarks.training.interrupts import DeferredInterrupt
from benchmarks.training.run import Run
from optimzoo.models import llama

START, RANK = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])


def note(out: Path, name: str, value: object) -> None:
    with Path(f"{out}-{name}.txt").open("a") as file:
        file.write(f"{value}\n")


def note_signals(out: Path, place: str) -> None:
    """Note the fault before it comes: this process sends no other signals."""
    kill = os.kill

    def noted(process: int, number: int) -> None:
        note(out, "faults", place)
        kill(process, number)

    os.kill = noted


def check_latest(checkpoints: Checkpoints) -> None:
    """Fail where `latest` names what is not complete."""
    latest = checkpoints.folder / "latest"
    if latest.exists():
        checkpoints.load(int(latest.read_text().strip().removeprefix("step-")))


def arm_on_resume(out: Path, fault: list[Any]) -> None:
    """Note where the run goes on, and be ready for the fault from there."""
    resume = Run.resume

    def resumed(self: Run, **options: Any) -> bool:
        if RANK == 0:
            check_latest(Checkpoints(out / "checkpoints"))
        found = resume(self, **options)
        if RANK == 0:
            note(out, "starts", self.step)
        if fault and fault[1] == RANK:
            place, _, count = fault
            note_signals(out, place)
            leave_at(count) if place == "leave" else arm(place, count)
        return found

    Run.resume = resumed  # type: ignore[method-assign]


def leave_at(step: int) -> None:
    """Have torchrun end the run before a step, which begins when the signal is here."""
    take, receive, arrived = Run.train_step, DeferredInterrupt._receive, []

    def taken(self: Run, log: bool, **how: Any) -> Any:
        if self.step == step:
            os.kill(os.getppid(), signal.SIGTERM)
            while not arrived:
                time.sleep(0.01)
        return take(self, log, **how)

    def received(self: DeferredInterrupt, number: int, frame: Any) -> None:
        arrived.append(number)
        receive(self, number, frame)

    Run.train_step = taken  # type: ignore[method-assign]
    DeferredInterrupt._receive = received  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, faults = Path(sys.argv[1]), json.loads(sys.argv[2])
    llama.CONFIGS["tiny"] = TINY
    arm_on_resume(folder, faults[START] if START < len(faults) else [])
    sys.argv = ["python -m benchmarks", *sys.argv[3:]]
    with weights_kept(folder):
        runpy.run_module("benchmarks", run_name="__main__")
