"""Published figures, each with its provenance."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def published() -> list[dict[str, Any]]:
    """Return one record per table and metric; ``values`` is by method and size.

    ``version`` is the paper's on arXiv, where more than one of them is at hand.
    """
    path = Path(__file__).with_name("published.json")
    return json.loads(path.read_text(encoding="utf-8"))
