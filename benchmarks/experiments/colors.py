"""One colour a method, in every picture and on the page of results."""

from collections.abc import Iterable
from itertools import cycle

# Each is 3:1 against white, and no two are near one another in OKLab.
COLORS = {
    "adamw": "#3d4148",
    "sgd": "#8c8f94",
    "scale": "#e05a00",
    "scale_spectral": "#1f7fe8",
    "muon": "#c0168c",
    "muon_8bit_scale": "#ff4f8b",
    "muon_rank4": "#e220f3",
    "muon_rank16": "#22004c",
    "rmnp": "#8a1fc0",
    "swan": "#0f9d9d",
    "sinkgd": "#35a03c",
    "sinkgd_scale": "#a86b62",
    "fira": "#b3121d",
    "galore": "#86860a",
    "natural_galore": "#0a5a14",
    "apollo": "#163f92",
    "apollo_mini": "#a06fd6",
    "stable_spam": "#6b3a12",
}
OTHERS = ("#b98500", "#5b35f0", "#6d0f4e", "#3f7265")


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """Return a colour for each method: its own, or for one that has none a free one."""
    names = dict.fromkeys(methods)
    free = cycle([*OTHERS, *(c for m, c in COLORS.items() if m not in names), *COLORS.values()])
    others = dict(zip(sorted(names.keys() - COLORS.keys()), free, strict=False))
    return {name: COLORS.get(name) or others[name] for name in names}
