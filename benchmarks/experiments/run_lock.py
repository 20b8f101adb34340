"""Locks of runs that several processes or machines share through a common folder."""

from pathlib import Path

from filelock import FileLock, Timeout


def lock_run(folder: Path) -> FileLock | None:
    """Lock the run of a folder until `release`. Return None if another process holds it.

    The kernel releases the lock of a process that ends, however it ends; on a network file system
    its server does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
