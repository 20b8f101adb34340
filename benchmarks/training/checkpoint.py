"""Checkpoints, written atomically and verified before they are loaded; the last few are kept.

::

    FOLDER/step-00000200/state.pt       tensors, numbers and text: torch.load(weights_only=True)
    FOLDER/step-00000200/manifest.json  whose they are, size and sha256 of the files, its own sha256
    FOLDER/latest                       the name of the newest

A folder is filled under another name, synced and renamed, so one called ``step-`` is complete
whatever kills the process that writes it. Needs a POSIX file system.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.common.files import sync_folder, write_atomic

FORMAT = 1  # of what is in a folder; another one is refused
_NAMED = 4  # differences that a message names


class DamagedError(ValueError):
    """Damage of a checkpoint's files."""


class Checkpoints:
    """The checkpoints of one run, by step.

    Args:
        folder: holds the checkpoints, and nothing else.
        keep: number of checkpoints to keep; older ones are removed after a new one is complete.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1")
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Return the saved steps in ascending order."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Write a checkpoint, mark it as the latest, and remove those beyond ``keep``.

        Args:
            step: of the checkpoint. An existing one stays: the run has resumed from it.
            state: tensors, numbers, text, and dicts and lists of them.
            identity: settings that a run must share to load it, as JSON values.

        Raises:
            OSError: it cannot be written; the message names the checkpoint to resume from.
        """
        final = self.path(step)
        unfinished = self.folder / f".{final.name}.{os.getpid()}"
        try:
            if not final.exists():
                unfinished.mkdir(parents=True)
                files = {"state.pt": _write_state(unfinished / "state.pt", state)}
                write_atomic(unfinished / "manifest.json", _manifest(step, identity, files))
                sync_folder(unfinished)
                os.rename(unfinished, final)
                sync_folder(self.folder)
            write_atomic(self.folder / "latest", f"{final.name}\n")
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            others = [n for n in self.steps() if n != step]
            last = f"{self.path(others[-1])} is whole" if others else "there is none before it"
            reason = error.strerror or error
            raise OSError(f"checkpoint {final} was not written ({reason}); {last}") from error
        for old in self.steps()[: -self.keep]:
            self._remove(self.path(old))

    def load(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return state and identity of a step after verifying every byte; tensors are mmapped.

        Raises:
            DamagedError: a file differs from what was written.
        """
        identity = self.check(step)
        try:
            path = self.path(step) / "state.pt"
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), identity
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
            raise DamagedError(f"state.pt cannot be read: {reason}") from None

    def check(self, step: int) -> dict[str, Any]:
        """Verify the files of a step against its manifest, and return its identity.

        Raises:
            DamagedError: a file is missing or differs, or the manifest has another format.
        """
        try:
            manifest = json.loads((self.path(step) / "manifest.json").read_bytes())
            sealed = manifest.pop("sha256")
            if sealed != _seal(manifest) or manifest["step"] != step:
                raise DamagedError("manifest.json is not as it was written")
            for name, written in manifest["files"].items():
                actual = _describe(self.path(step) / name)
                for fact in written:
                    if actual[fact] != written[fact]:
                        raise DamagedError(f"{name} has {fact} {actual[fact]}, not {written[fact]}")
            return dict(manifest["identity"])
        except FileNotFoundError as error:
            raise DamagedError(f"{Path(error.filename).name} is missing") from None
        except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DamagedError(f"manifest.json cannot be read: {error!r}") from None
        except json.JSONDecodeError as error:
            raise DamagedError(f"manifest.json cannot be read: {error}") from None

    def newest(
        self, identity: Mapping[str, Any], *, skip_damaged: bool = False
    ) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the newest checkpoint, or None if there is none.

        It only reads, so every process of a run may call it.

        Args:
            identity: of the run that resumes.
            skip_damaged: skip damaged checkpoints.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another run.
        """
        steps = self.steps()
        while steps:
            step = steps.pop()
            path = self.path(step)
            try:
                state, saved = self.load(step)
            except DamagedError as error:
                if skip_damaged:
                    continue
                raise ValueError(f"{path} is damaged: {error}; {self._way_out(steps)}") from None
            if differ := _differences(saved, identity):
                raise ValueError(
                    f"{path} belongs to a run with {differ}; use another --out, or delete it"
                )
            return step, state
        return None

    def prune_after_resume(self, step: int | None) -> None:
        """Mark the resumed ``step`` as the latest, and remove unfinished files of dead processes.

        Newer checkpoints, which are damaged, are kept as ``damaged-step-...``. One process must
        call this, after all have loaded.
        """
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for newer in self.steps():
            if step is None or newer > step:
                aside = self.folder / f"damaged-{self.path(newer).name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.path(newer), aside)
        if step is not None:
            write_atomic(self.folder / "latest", f"{self.path(step).name}\n")

    def clear(self) -> None:
        """Remove all checkpoints."""
        if self.folder.exists():
            self._remove(self.folder)

    def _way_out(self, earlier: list[int]) -> str:
        for step in reversed(earlier):
            with suppress(DamagedError):
                self.check(step)
                return f"--skip-damaged goes on from {self.path(step).name}, the one before it"
        return "no whole one is before it: delete it to start over"

    def _remove(self, path: Path) -> None:
        """Rename a complete folder before removing it, so that no partial one has its name."""
        dead = path.with_name(f".{path.name}.{os.getpid()}")
        os.rename(path, dead)
        shutil.rmtree(dead)


class _Sink:
    """File for torch.save that counts and hashes what is written.

    An error is stored in ``error`` and raised later: torch.save does not survive one midway.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self.file.write(data)
                self.sha256.update(data)
                self.bytes += size
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """Do nothing; `_write_state` flushes at the end."""


def _write_state(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        sink = _Sink(file)
        torch.save(dict(state), sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": sink.bytes, "sha256": sink.sha256.hexdigest()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _manifest(step: int, identity: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    manifest = {"step": step, "identity": dict(identity), "files": dict(files)}
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    differ = [
        f"{key}={saved.get(key)!r}, not {ours.get(key)!r}"
        for key in sorted({**ours, **saved}, key=lambda key: "." in key)  # settings, then weights
        if saved.get(key) != ours.get(key)
    ]
    more = [f"{len(differ) - _NAMED} differences more"] if len(differ) > _NAMED else []
    return "; ".join(differ[:_NAMED] + more)
