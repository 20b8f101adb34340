"""Published figures, each with its provenance."""

from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common.files import read_json


@cache
def published() -> list[dict[str, Any]]:
    """Return one record per table and metric; ``values`` is by method and size.

    ``version`` is the paper's on arXiv, where more than one of them is at hand.
    """
    return read_json(Path(__file__).with_name("published.json"))
