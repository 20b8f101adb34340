"""Runs shared by several processes, on one machine or several with a common folder.

A run is claimed by making the file `claim.N` in its folder, which only one process can do. The
holder touches it every few seconds. A claim whose process is dead, or that was not touched for a
minute, is taken over by making `claim.N+1`: the highest number holds the run, so two that take over
at once cannot both have it, and a holder that was only asleep sees that it has lost it.
"""

import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds between two touches
STALE = 60.0  # seconds without one after which the holder counts as gone


class Lost(RuntimeError):
    """Another process has taken the run over."""


class Claim:
    """A run that this process holds until the `with` block ends."""

    def __init__(self, path: Path, work: "WorkList") -> None:
        self.path, self.lost = path, False
        self._work = work

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: Any) -> None:
        self._work.release(self)

    def check(self) -> None:
        """Raise `Lost` if another process has taken the run over."""
        if self.lost:
            raise Lost(f"{self.path.parent.name} was taken over by another process")

    def beat(self) -> None:
        """Say that this process is alive, and look whether the run is still its own."""
        numbers = _numbers(self.path.parent)
        self.lost = _number(self.path) not in numbers or _number(self.path) != max(numbers)
        if not self.lost:
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self.lost = True


class WorkList:
    """Claims on runs, each a folder."""

    def __init__(self) -> None:
        self._held: set[Claim] = set()
        self._seen: dict[Path, tuple[int, float]] = {}
        self._beating: threading.Thread | None = None
        self._lock = threading.Lock()

    def claim(self, folder: Path) -> Claim | None:
        """The run of ``folder``, or None while another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        last = max(_numbers(folder), default=-1)
        if last >= 0 and not self._stale(folder / f"claim.{last}"):
            return None
        path = folder / f"claim.{last + 1}"
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump({"place": _place(), "pid": os.getpid()}, file)
        except FileExistsError:
            return None
        claim = Claim(path, self)
        with self._lock:
            self._held.add(claim)
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, daemon=True)
                self._beating.start()
        return claim

    def release(self, claim: Claim) -> None:
        """Let a run go, finished or not; what was left of older claims goes with it."""
        with self._lock:
            self._held.discard(claim)
        own = _number(claim.path)
        for number in sorted(_numbers(claim.path.parent)):
            if number <= own:
                claim.path.with_name(f"claim.{number}").unlink(missing_ok=True)

    def _stale(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime_ns
            holder = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False  # released just now: the next look finds it free
        except ValueError:
            holder = {}  # made, and not yet written
        if holder.get("place") == _place() and not self._alive(path, holder["pid"]):
            return True
        # By this process's own clock: those of two machines need not agree.
        before, since = self._seen.get(path, (None, 0.0))
        if touched != before:
            self._seen[path] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > STALE

    def _alive(self, path: Path, pid: int) -> bool:
        if pid == os.getpid():  # an earlier process with this number has left it
            with self._lock:
                return any(claim.path == path for claim in self._held)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it is somebody else's, and alive
        return True

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                held = list(self._held)
            for claim in held:
                claim.beat()


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _numbers(folder: Path) -> list[int]:
    words = [path.suffix[1:] for path in folder.glob("claim.*")]
    return [int(word) for word in words if word.isdigit()]


def _place() -> str:
    """Where a process number means something: the machine, and the container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}"
