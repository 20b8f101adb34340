"""Published perplexity tables, and our methods for each of their rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperComparison:
    """A published table and the plans of the methods in it.

    Attributes:
        title: name and source of the table.
        paper: the published figures' ``paper``, without its number.
        metric: their metric; `log`: they are log-perplexities.
        version: the one version of the paper whose figures are taken, or None if there is one.
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
    version: str | None = None
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
_PERPLEXITY = "eval perplexity"
_SCALE_V1 = (
    "v1 of arXiv 2506.16659, from the authors' README, has every method. v3 (ICML 2026) is known "
    "for five, from a secondary source: the same up to 350M, and lower at 1B, on more tokens."
)
TABLES = {
    "scale-main": PaperComparison(
        "SCALE, main table",
        "SCALE",
        _PERPLEXITY,
        "60M",
        ("nano",),
        _SCALE,
        version="v1",
        notes=(_SCALE_V1,),
    ),
    "scale-ablation": PaperComparison(
        "SCALE, ablation of the normalisation",
        "SCALE",
        _PERPLEXITY,
        "60M",
        ("nano-ablation", "nano"),
        _ABLATION,
        version="v3",
        notes=(
            "v3 of arXiv 2506.16659 (ICML 2026), from a secondary source; v1's ablation was not at "
            "hand.",
            "SCALE, SCALE spectral and Adam are those of scale-main.",
        ),
    ),
    "natural-galore": PaperComparison(
        "Natural GaLore, comparison on C4",
        "Natural GaLore",
        "validation log-perplexity (nats, avg 5 runs)",
        "60M",
        ("nano", "nano-lowrank"),
        _NATURAL,
        log=True,
        notes=("The paper gives log-perplexities; here is their exponential.",),
    ),
    "low-rank": PaperComparison(
        "Low-rank pretraining (2505.22922)",
        "Scalable",
        _PERPLEXITY,
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
        _PERPLEXITY,
        "60M",
        ("full",),
        {**_SCALE, "natural_galore": None, "low_rank_restarts": None, "sltrain": None},
        protocol="paper",
        version="v1",
        notes=(_SCALE_V1, "Published rates and steps; of Adam, whose rate is not known, 1e-3."),
    ),
}
