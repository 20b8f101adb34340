"""Installed optimizers of other packages, for comparison of step times."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]


def peers(rank: int, gap: int) -> dict[str, Make]:
    """Map the names of installed methods to functions that create them from groups with roles.

    Low-rank methods get the hidden weights at ``rank``, refreshed every ``gap`` steps, and use
    their Adam for the others, as their authors do; all other methods get all parameters.
    """
    low_rank = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    apollo = {**low_rank, "scale": 1, "proj": "random", "scale_type": "channel"}
    kozistr = {k: v for k, v in low_rank.items() if k != "proj_type"} | {"projection_type": "std"}
    kozistr_apollo = {**kozistr, "scale": 1.0, "projection_type": "random", "scale_type": "channel"}
    quiet = {"no_deprecation_warning": True}
    classes: list[tuple[str, str, str, dict[str, Any] | None, dict[str, Any]]] = [
        ("galore-torch", "galore_torch", "GaLoreAdamW", low_rank, quiet),
        ("apollo-torch", "apollo_torch", "APOLLOAdamW", apollo, {}),
        ("pytorch_optimizer GaLore", "pytorch_optimizer", "GaLore", kozistr, {}),
        ("pytorch_optimizer Fira", "pytorch_optimizer", "Fira", kozistr, {}),
        ("pytorch_optimizer APOLLO", "pytorch_optimizer", "APOLLO", kozistr_apollo, {}),
        ("pytorch_optimizer StableSPAM", "pytorch_optimizer", "StableSPAM", None, {}),
        ("pytorch_optimizer StableAdamW", "pytorch_optimizer", "StableAdamW", None, {}),
        ("heavyball AdamW", "heavyball", "AdamW", None, {}),
        ("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", None, {}),
        ("torchao AdamW8bit", "torchao.optim", "AdamW8bit", None, {}),
    ]
    makers: dict[str, Make] = {}
    if hasattr(torch.optim, "Muon"):
        makers["torch Muon"] = TorchMuon
    for name, module, cls, group_options, options in classes:
        try:
            optimizer_class = getattr(importlib.import_module(module), cls)
        except (ImportError, AttributeError, OSError):
            continue
        makers[name] = _maker(optimizer_class, group_options, options)
    return makers


class TorchMuon(torch.optim.Optimizer):
    """``torch.optim.Muon`` of the hidden weights, which are all that it takes, and AdamW."""

    def __init__(self, groups: Groups) -> None:
        hidden = [p for g in groups if g["role"] == "hidden" for p in g["params"]]
        others = [p for g in groups if g["role"] != "hidden" for p in g["params"]]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=1e-4)]
        self.parts += [torch.optim.AdamW(others, lr=1e-4, fused=True)] if others else []
        super().__init__([*hidden, *others], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step Muon, then AdamW; ignore ``closure``."""
        for part in self.parts:
            part.step()


def _maker(cls: Any, group_options: dict[str, Any] | None, options: dict[str, Any]) -> Make:
    def make(groups: Groups) -> torch.optim.Optimizer:
        if group_options is None:
            params: Groups = [{"params": g["params"]} for g in groups]
        else:
            params = [
                {"params": g["params"], **group_options} for g in groups if g["role"] == "hidden"
            ]
            others = [p for g in groups if g["role"] != "hidden" for p in g["params"]]
            params += [{"params": others}] if others else []
        return cls(params, lr=1e-4, **options)

    return make
