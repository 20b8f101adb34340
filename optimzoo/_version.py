"""Versions of optimzoo and of the tested torch, importable without torch."""

import warnings

__version__ = "0.1.0"

# The oldest and the newest torch that the tests are run with. setup.cfg names the oldest too.
TESTED_TORCH = ("2.9", "2.14")


def warn_of_untested_torch(torch_version: str) -> None:
    """Warn in one line if ``torch_version``, torch's own ``TorchVersion``, is not a tested one."""
    oldest, newest = TESTED_TORCH
    major, minor = newest.split(".")
    # A nightly build of the next release sorts before that release, and after its ".dev0".
    if oldest <= torch_version < f"{major}.{int(minor) + 1}.dev0":
        return
    effect = (
        "parts of it need a newer torch and fail"
        if torch_version < oldest
        else "it may work, but nobody has run the tests with it"
    )
    warnings.warn(
        f"torch {torch_version} is outside the range that optimzoo is tested with, "
        f"{oldest} to {newest}: {effect}",
        stacklevel=3,  # the line that imports optimzoo
    )
