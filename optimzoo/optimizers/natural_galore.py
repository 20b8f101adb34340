"""Natural GaLore: GaLore on natural gradients, by Woodbury's formula (arXiv 2410.16029)."""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.core.adam import bias_correction
from optimzoo.core.matrix_optimizer import adam_direction
from optimzoo.core.optimizer import options_of
from optimzoo.core.record import register
from optimzoo.core.role_options import SharedOptions
from optimzoo.core.rule import Context
from optimzoo.core.update import Update
from optimzoo.core.validation import check_choice, check_nonnegative
from optimzoo.optimizers.galore import LowRankOptimizer, LowRankUpdate, low_dimension
from optimzoo.stacks import State, each
from optimzoo.subspace.natural import natural_gradient
from optimzoo.subspace.projector import project

HISTORY_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "int8")


@register(
    "natural_galore",
    "GaLore on natural gradients (Woodbury)",
    source="arXiv 2410.16029",
    state="low rank: (2 + s) r x longer side + r x shorter side; 2 x rest",
)
class NaturalGaLore(LowRankOptimizer):
    r"""GaLore, with the low-rank gradient preconditioned by an empirical Fisher matrix.

    With ``g = vec(R)`` the low-rank gradient of GaLore, of ``k`` elements, and ``h_j`` the last
    `history` of them, the current one included::

        F = λ I + Σ_j h_j h_jᵀ
        n = F⁻¹ g                                (k × k never formed: s × s by Woodbury)
        M, V ← Adam's moments of n
        W ← (1 − ηλ') W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · scale · P (M / (√V + eps))

    All other parameters take Adam. The history is a ring of s gradients; its Gram matrix
    ``[s, s]`` is kept and updated, so the solve costs two passes over the history and one Cholesky.

    State of a hidden weight, in elements: GaLore's ``2 r max(m, n) + r min(m, n)`` and the
    history's ``s r max(m, n) + s²``. At s = 20 that is ten times the moments: the paper's memory
    column, equal to GaLore's, leaves it out. `history_dtype="int8"`, which `state_bits=8` takes by
    itself, holds it in a byte an element, and a scale for each row of a gradient.

    Args:
        params: groups from :func:`optimzoo.param_groups`; bare parameters fall back by shape.
        lr: learning rate; a group may carry its own.
        betas: Adam's betas.
        eps: Adam's eps, before the bias correction.
        weight_decay: λ', decoupled, or cautious by `weight_decay_style`.
        rank: rank of the subspace.
        update_proj_gap: steps between two refreshes.
        scale: the paper's α.
        history: s, gradients in the Fisher matrix. 20 in the authors' code; the paper names none.
        damping: λ. 1e-3 in the authors' code; the paper names none.
        relative_damping: λ in units of μ, the mean squared norm of the history, and
            ``n = (1 + λ) μ F⁻¹ g`` (ours): without it the transform fades away where ‖g‖² is far
            below λ. Strong damping then gives GaLore: ``n → g``.
        history_dtype: `auto` (the gradient's; codes with `state_bits=8`), `float32`, `bfloat16`,
            `float16`, `float64`; `int8`: each gradient of the history is rounded once, to codes
            that are off by at most 1/254 of its row's largest magnitude.
        projector: `randomized` (ours), `svd` or `power`.
        side: `auto` (the paper, one-sided) or `both` (the authors' code: r × r), `left`, `right`.
        rotate: at a refresh, rotate moments and history into the new subspace (ours); `False`, the
            authors' code, reads them as they are.
        options: shared options, :class:`~optimzoo.core.role_options.SharedOptions`.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a sparse gradient; a Fisher matrix that no jitter makes positive definite.

    The authors' code: ``projector="svd", side="both", rotate=False``.

    Source: arXiv 2410.16029; selfsupervised-ai/Natural-GaLore. That code projects both sides by a
    Tucker decomposition; for a matrix its best subspaces are those of the SVD, used here.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        history: int = 20,
        damping: float = 1e-3,
        relative_damping: bool = False,
        history_dtype: str = "auto",
        projector: str = "randomized",
        side: str = "auto",
        rotate: bool = True,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(params, options_of(locals()), **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if options["history"] < 1:
            raise ValueError(f"Invalid history: {options['history']}; it must be at least 1")
        check_nonnegative(damping=options["damping"])
        check_choice("history_dtype", options["history_dtype"], HISTORY_DTYPES)

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return Adam's direction of the natural gradient in the subspace."""
        step, shards = context.step, context.shards
        low = project(state, grad, shards)
        if "history" not in state:
            _init_history(state, low, group)
        elif group["history_dtype"] == "auto" and each(state, "history")[0].dtype == torch.float16:
            state["history"] = state["history"].float()  # as an older checkpoint has it
        row = (step - 1) % state["gram"].shape[-1]
        natural = natural_gradient(
            state,
            low,
            row.long() if isinstance(row, Tensor) else row,
            damping=group["damping"],
            relative=group["relative_damping"],
            shards=shards,
            over=low_dimension(group, shards.shape(grad.shape)),
        )
        adam = adam_direction(state, natural, group, step)
        scale = bias_correction(step, group["betas"]) * group["scale"]
        return LowRankUpdate(adam, scale, state)


def _init_history(state: State, low: Tensor, group: dict[str, Any]) -> None:
    size, name = group["history"], group["history_dtype"]
    batch, shape = low.shape[:-2], low.shape[-2:]
    if name == "auto" and group["state_bits"] == 8:
        name = "int8"
    dtype = low.dtype if name == "auto" else getattr(torch, name)
    gram = torch.promote_types(dtype, torch.promote_types(low.dtype, torch.float32))
    state["history"] = torch.zeros(*batch, size, *shape, dtype=dtype, device=low.device)
    if name == "int8":
        scale = torch.zeros(*batch, size, shape[0], 1, dtype=gram, device=low.device)
        state["history_scale"] = scale
    state["gram"] = torch.zeros(*batch, size, size, dtype=gram, device=low.device)
