"""Published perplexity tables, and our methods for each of their rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperComparison:
    """A published table and the plans of the methods in it.

    Attributes:
        title: name and source of the table.
        paper, metric: keys of the published figures; `log`: they are log-perplexities.
        size: the published size that is shown; tau is computed at every one.
        plans: names of plans at nano; the first one that has a method provides it.
        methods: maps our method to its name in the paper, or None.
        reference: the method that ratios refer to.
        protocol: of the plans.
        notes: printed below the table.
    """

    title: str
    paper: str
    metric: str
    size: str
    plans: tuple[str, ...]
    methods: dict[str, str | None]
    reference: str = "adamw"
    protocol: str = "tuned"
    log: bool = False
    notes: tuple[str, ...] = ()


_SCALE: dict[str, str | None] = {
    "adamw": "Adam",
    "stable_spam": "Stable-SPAM",
    "muon": "Muon",
    "galore": "GaLore",
    "fira": "Fira",
    "swan": "SWAN",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "scale": "SCALE",
    "scale_spectral": None,
}
_ABLATION: dict[str, str | None] = {
    "adamw": "Adam",
    "sign": "SGD + sign norm",
    "row": "SGD + row-wise norm",
    "column": "SGD + column-wise norm (no momentum)",
    "spectral": "SGD + singular-value norm (NS)",
    "scale": "SGD col-norm + last-layer momentum (SCALE)",
    "column_first": None,
    "column_both": None,
    "scale_spectral": None,
}
_NATURAL: dict[str, str | None] = {
    "adamw": "Full-Rank",
    "natural_galore": "Natural GaLore",
    "galore": "GaLore",
    "low_rank": "Low-Rank",
    "lora": "LoRA",
    "relora": "ReLoRA",
}
_LOW_RANK: dict[str, str | None] = {
    "adamw": "Full-Rank (best optimizer)",
    "sltrain_restarts": "SLTrain-restarts",
    "low_rank_restarts": "Low-Rank-restarts",
    "fira": "Fira",
    "galore": "GaLore",
    **dict.fromkeys(("low_rank", "low_rank_refactorize", "low_rank_reset", "lora", "relora")),
    "sltrain": None,
}
TABLES = {
    "scale-main": PaperComparison("SCALE, main table", "SCALE", "eval", "60M", ("nano",), _SCALE),
    "scale-ablation": PaperComparison(
        "SCALE, ablation of the normalisation",
        "SCALE",
        "eval",
        "60M",
        ("nano-ablation", "nano"),
        _ABLATION,
        notes=(
            "SCALE, SCALE spectral and Adam are those of scale-main, tuned on its larger grid.",
        ),
    ),
    "natural-galore": PaperComparison(
        "Natural GaLore, comparison on C4",
        "Natural GaLore",
        "validation log-perplexity",
        "60M",
        ("nano", "nano-lowrank"),
        _NATURAL,
        log=True,
        notes=("The paper gives log-perplexities; here is their exponential.",),
    ),
    "low-rank": PaperComparison(
        "Low-rank pretraining (2505.22922)",
        "Scalable",
        "eval",
        "1B",
        ("nano-lowrank",),
        _LOW_RANK,
        notes=(
            "The paper's Full-Rank is its best optimizer, Stable-SPAM; ours is AdamW. Its figures "
            "below 1B were not at hand.",
        ),
    ),
    "full": PaperComparison(
        "The published protocol",
        "SCALE",
        "eval",
        "60M",
        ("full",),
        {**_SCALE, "natural_galore": None, "low_rank_restarts": None, "sltrain": None},
        protocol="paper",
        notes=("Published rates and steps; of Adam, whose rate is not known, 1e-3.",),
    ),
}
