"""The optimizers as records for PyTorch's own test machinery, and a model with every role.

`OptimizerInfo`, `OptimizerInput` and `ErrorOptimizerInput` ship in the torch wheel.
"""

import copy
import importlib.util
import re
import sys
import types
import unittest
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from optimzoo import (
    APOLLO,
    RMNP,
    SCALE,
    SWAN,
    AdamS,
    APOLLOMini,
    Fira,
    GaLore,
    Muon,
    NaturalGaLore,
    SinkGD,
    StableSPAM,
    param_groups,
)

if importlib.util.find_spec("expecttest") is None:
    # Torch's test machinery is derived from its one class, of which nothing here makes use.
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

VOCAB = 13
LR = 2**-10  # exact in every dtype, so that a float and a tensor are the same number


class Tiny(nn.Module):
    """Embedding, hidden weight, vector, head: the four roles, and no square weight."""

    def __init__(self, device="cpu", dtype=torch.float32, *, contiguous=True, seed=0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 5)
        self.hidden = nn.Linear(5, 7)
        self.lm_head = nn.Linear(7, VOCAB, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            for name, param in module.named_parameters(recurse=False):
                value = torch.randn(param.shape, generator=generator, dtype=torch.float64) / 2
                value = value.to(device, dtype)
                if not contiguous:
                    value = torch.stack([value, value], -1)[..., 0]
                setattr(module, name, nn.Parameter(value))
        ids = torch.randint(VOCAB, (2, 64), generator=generator)
        self.ids, self.labels = ids.to(device)

    def forward(self):
        logits = self.lm_head(self.hidden(self.embed(self.ids)))
        return nn.functional.cross_entropy(logits, self.labels)


def train(model, optimizer, steps, schedulers=()) -> list[float]:
    """`steps` full-batch steps; the losses before each."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for scheduler in schedulers:
            scheduler.step(*[losses[-1]] * isinstance(scheduler, ReduceLROnPlateau))
    return losses


def configurations(info: OptimizerInfo, device, *, flag: str = "foreach") -> Iterator[Any]:
    """(description, hyperparameters) of every input, with `flag` off and, if supported, on."""
    for entry in info.optim_inputs_func(device=device):
        if entry.kwargs.keys() & {"rounding", "state_bits"} and flag != "foreach":
            continue  # what is counted in Python excludes the other flags
        yield entry.desc, copy.deepcopy(entry.kwargs)
        # The zoo's own rules have no such path, the Adam beside them has: once for its options.
        if flag in info.supported_impls and "rank" not in entry.kwargs:
            yield f"{entry.desc} & {flag}", {**copy.deepcopy(entry.kwargs), flag: True}


def build(info: OptimizerInfo, model: nn.Module, **kwargs) -> torch.optim.Optimizer:
    """The optimizer over the model's roles."""
    return info.optim_cls(param_groups(model), **kwargs)


def _inputs(**named: dict[str, Any]) -> list[OptimizerInput]:
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=desc.replace("_", " "))
        for desc, kwargs in named.items()
    ]


STOCHASTIC = {"rounding": "stochastic", "seed": 5, "weight_decay": 0.1}
CAUTIOUS = {"weight_decay": 0.1, "weight_decay_style": "cautious"}


def scale_inputs(device, dtype=None) -> list[OptimizerInput]:
    return _inputs(
        default={},
        lr={"lr": 2**-8},
        Tensor_lr={"lr": torch.tensor(LR)},
        Tensor_lr_of_one_dimension={"lr": torch.tensor([LR], device=device)},
        vector_lr={"vector_lr": 2**-7},
        norm_l2={"norm": "l2"},
        row={"normalize": "row"},
        sign={"normalize": "sign"},
        spectral={"normalize": "spectral"},
        spectral_l2={"normalize": "spectral", "norm": "l2"},
        weight_decay={"weight_decay": 0.1},
        weight_decay_and_Tensor_lr={"weight_decay": 0.1, "lr": torch.tensor(LR)},
        maximize={"maximize": True},
        maximize_and_weight_decay={"maximize": True, "weight_decay": 0.1},
        cautious=CAUTIOUS,
        no_momentum={"momentum": 0.0},
        stochastic=STOCHASTIC,
        stochastic_row={**STOCHASTIC, "normalize": "row"},
        codes={"state_bits": 8, "rounding": "stochastic"},
        epsilons={"eps": 1e-6, "other_eps": 1e-6, "other_betas": (0.5, 0.75)},
        capturable={"capturable": True},
        capturable_and_Tensor_lr={"capturable": True, "lr": torch.tensor(LR, device=device)},
    )


def momentum_inputs(device, dtype=None, **own: dict[str, Any]) -> list[OptimizerInput]:
    """Return the inputs that Muon and RMNP share, and a method's own."""
    return _inputs(
        default={},
        lr={"lr": 2**-8},
        Tensor_lr={"lr": torch.tensor(LR), "other_lr": torch.tensor(LR)},
        momentum={"momentum": 0.5},
        no_nesterov={"nesterov": False},
        weight_decay={"weight_decay": 0.1, "other_weight_decay": 0.2},
        cautious={**CAUTIOUS, "other_weight_decay": 0.2},
        match_rms_adamw={"adjust_lr_fn": "match_rms_adamw"},
        spectral_unclamped={"adjust_lr_fn": "spectral_unclamped"},
        maximize={"maximize": True, "weight_decay": 0.1},
        codes={"state_bits": 8},
        AdamW={"other_lr": 2**-8, "other_betas": (0.5, 0.75), "other_eps": 1e-6},
        all_matrices={"roles": ("hidden", "embedding", "head")},
        other_scale={"other": "scale", "weight_decay": 0.1},
        other_adafactor={"other": "adafactor", "maximize": True},
        stochastic=STOCHASTIC,
        **own,
    )


MUONS_OWN = {
    "more_iterations": {"ns_steps": 6},
    "iterations_of_their_own": {"ns_coefficients": [(4.0, -6.0, 3.0), (2.0, -1.5, 0.5)]},
    "in_float64": {"ns_dtype": "float64"},
    "low_rank": {"momentum_rank": 2, "weight_decay": 0.1},
    "low_rank_beside_codes": {"momentum_rank": 2, "state_bits": 8, "nesterov": False},
}


def zoo_inputs(**own: dict[str, Any]):
    """The inputs that all methods with Adam beside them share, and a method's own."""

    def inputs(device, dtype=None) -> list[OptimizerInput]:
        return _inputs(
            default={},
            Tensor_lr={"lr": torch.tensor(LR)},
            Tensor_lr_of_one_dimension={"lr": torch.tensor([LR], device=device)},
            betas={"betas": (0.5, 0.75), "eps": 1e-5},
            weight_decay={"weight_decay": 0.1},
            weight_decay_and_Tensor_lr={"weight_decay": 0.1, "lr": torch.tensor(LR)},
            maximize_and_weight_decay={"maximize": True, "weight_decay": 0.1},
            cautious=CAUTIOUS,
            stochastic=STOCHASTIC,
            **own,
        )

    return inputs


def coded_inputs(**own: dict[str, Any]):
    """:func:`zoo_inputs`, and moments as codes."""
    return zoo_inputs(codes={"state_bits": 8}, **own)


LOW = {"rank": 2, "update_proj_gap": 2}
SUBSPACES = {
    "low_rank": LOW,
    "published": {**LOW, "projector": "svd", "rotate": False},
    "left_and_weight_decay": {**LOW, "side": "left", "projector": "power", "weight_decay": 0.1},
}
BOTH_SIDES = {"both_sides": {**LOW, "side": "both"}}


def _refusals(cases) -> list[ErrorOptimizerInput]:
    return [
        ErrorOptimizerInput(
            OptimizerInput(params=params, kwargs=kwargs, desc=regex),
            error_type=error,
            error_regex=regex,
        )
        for params, kwargs, error, regex in cases
    ]


def _common_refusals(device, dtype) -> list[ErrorOptimizerInput]:
    matrix = nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
    vector = nn.Parameter(torch.randn(2, device=device, dtype=dtype))
    complex_matrix = nn.Parameter(torch.randn(3, 2, device=device, dtype=torch.complex64))
    sparse = nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
    sparse.grad = torch.ones_like(sparse).to_sparse()
    cases = [
        (None, {"lr": -1.0}, ValueError, "[Ll]earning rate.*-1.0"),
        (None, {"lr": float("nan")}, ValueError, "[Ll]earning rate.*nan"),
        (None, {"weight_decay": -1.0}, ValueError, "weight.decay.*-1.0"),
        ([], {}, ValueError, "empty parameter list"),
        ([7.0], {}, TypeError, "can only optimize Tensors"),
        ([matrix * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": {matrix}}], {}, TypeError, "ordered collections"),
        ([complex_matrix], {}, ValueError, "complex parameters are not supported: parameter 0"),
        ([{"params": [matrix], "role": "body"}], {}, ValueError, "unknown role 'body'"),
        ([{"params": [vector], "role": "head"}], {}, ValueError, r"\(2,\).*give it the role 'vec"),
        ([{"params": [("v", vector)], "role": "hidden"}], {}, ValueError, r"^v has shape \(2,\)"),
        (None, {"weight_decay_style": "l2"}, ValueError, "style: 'l2'; .*decoupled, cautious$"),
        ([{"params": [matrix], "weight_decay_style": "l2"}], {}, ValueError, "style: 'l2'; .*of"),
        (None, {"rounding": "up"}, ValueError, "Invalid rounding: 'up'; .*nearest, stochastic"),
        (None, {"rounding": "stochastic", "seed": -1}, ValueError, "Invalid seed: -1; .*2.62 - 1"),
    ]
    at_step = ErrorOptimizerInput(
        OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient"),
        error_on=OptimizerErrorEnum.STEP_ERROR,
        error_regex="does not support sparse gradients",
    )
    return [*get_error_inputs_for_all_optims(device, dtype), *_refusals(cases), at_step]


def scale_error_inputs(device, dtype) -> list[ErrorOptimizerInput]:
    matrix = nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
    cases = [
        (None, {"state_bits": 4}, ValueError, "Invalid state_bits: 4; it must be None or 8"),
        (None, {"state_bits": 8, "capturable": True}, ValueError, "excludes capturable=True"),
        (None, {"momentum": -0.5}, ValueError, "momentum.*-0.5"),
        (None, {"momentum": 1.0}, ValueError, r"Invalid momentum value: 1.0; .* \[0, 1\)"),
        (None, {"eps": 0.0}, ValueError, "Invalid eps value: 0.0; it must be > 0"),
        (None, {"other_eps": -1.0}, ValueError, "Invalid other_eps value: -1.0"),
        (None, {"other_betas": (0.9, 1.0)}, ValueError, "beta parameter at index 1: 1.0"),
        (None, {"other_betas": (-0.1, 0.9)}, ValueError, "beta parameter at index 0: -0.1"),
        (None, {"normalize": "rows"}, ValueError, "Invalid normalize: 'rows'.*column, row"),
        (None, {"norm": "l1"}, ValueError, "Invalid norm: 'l1'.*rms, l2"),
        (None, {"fused": True, "normalize": "spectral"}, ValueError, "has no fused kernel"),
        (None, {**STOCHASTIC, "capturable": True}, ValueError, "it excludes capturable=True"),
        (None, {**STOCHASTIC, "differentiable": True}, ValueError, "and differentiable=True"),
        (None, {"fused": True, "foreach": True}, ValueError, "fused=True excludes foreach=True"),
        (None, {"foreach": True, "differentiable": True}, ValueError, "foreach=True cannot be"),
        (None, {"vector_lr": 1e-3}, ValueError, "vector_lr needs groups that carry roles"),
        (None, {"vector_lr": -1.0}, ValueError, "Invalid vector_lr: -1.0"),
        (None, {"vector_lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ([{"params": [matrix], "momentum": 2.0}], {}, ValueError, "Invalid momentum value: 2.0"),
        ([{"params": [matrix], "lr": -2.0}], {}, ValueError, "Invalid learning rate: -2.0"),
    ]
    return _common_refusals(device, dtype) + _refusals(cases)


def momentum_error_inputs(device, dtype) -> list[ErrorOptimizerInput]:
    experts = nn.Parameter(torch.randn(4, 3, 2, device=device, dtype=dtype))
    blocks = {"params": [experts], "stacked": True, "heads": 2}
    cases = [
        ([blocks], {}, ValueError, r"Invalid heads: 2; it must divide the 3 rows of \[4, 3, 2\]"),
        ([{**blocks, "heads": 0}], {}, ValueError, "Invalid heads: 0; it must divide"),
        (None, {"momentum": -0.5}, ValueError, "momentum.*-0.5"),
        (None, {"momentum": 1.0}, ValueError, r"Invalid momentum value: 1.0; .* \[0, 1\)"),
        (None, {"adjust_lr_fn": "max"}, ValueError, "adjust_lr_fn: 'max'.*original, match_rms"),
        (None, {"state_bits": 4}, ValueError, "Invalid state_bits: 4; it must be None or 8"),
        (None, {"other_lr": -1.0}, ValueError, "Invalid other_lr: -1.0"),
        (None, {"other_lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        (None, {"other_betas": (0.9, 1.0)}, ValueError, "beta parameter at index 1: 1.0"),
        (None, {"other_eps": -1.0}, ValueError, "other_eps value: -1.0"),
        (None, {"other_weight_decay": -1.0}, ValueError, "other_weight_decay value: -1.0"),
        (None, {"roles": ("hidden", "tail")}, ValueError, "unknown role 'tail'"),
    ]
    return _common_refusals(device, dtype) + _refusals(cases)


def muon_error_inputs(device, dtype) -> list[ErrorOptimizerInput]:
    cases = [
        (None, {"ns_steps": 0}, ValueError, "Invalid ns_steps: 0; it must be from 1 to 99"),
        (None, {"ns_dtype": "int8"}, ValueError, "Invalid ns_dtype: 'int8'; .*bfloat16, float16"),
        (None, {"ns_dtype": torch.int8}, ValueError, "Invalid ns_dtype: 'int8'"),
        (None, {"ns_coefficients": (1, 2)}, ValueError, r"ns_coefficients: \(1, 2\); .*three"),
        (None, {"momentum_rank": 0}, ValueError, "Invalid momentum_rank: 0; .*at least 1, or None"),
        (None, {"momentum_rank": 2.5}, ValueError, "Invalid momentum_rank: 2.5; .*an integer"),
    ]
    return momentum_error_inputs(device, dtype) + _refusals(cases)


def zoo_error_inputs(**own: tuple[Any, str]):
    """The refusals that those methods share, and a method's own: option = (value, message)."""

    def inputs(device, dtype) -> list[ErrorOptimizerInput]:
        matrix = nn.Parameter(torch.randn(3, 2, device=device, dtype=dtype))
        cases = [
            (None, {"betas": (0.9, 1.0)}, ValueError, r"parameter at index 1: 1.0; .* \[0, 1\)"),
            (None, {"betas": (-0.1, 0.9)}, ValueError, "beta parameter at index 0: -0.1"),
            (None, {"eps": -1.0}, ValueError, "Invalid eps value: -1.0; it must be >= 0"),
            (None, {"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
            ([{"params": [matrix], "lr": -2.0}], {}, ValueError, "Invalid learning rate: -2.0"),
            ([{"params": [matrix], "eps": -2.0}], {}, ValueError, "Invalid eps value: -2.0"),
        ]
        cases += [
            (None, {name.rstrip("_"): v}, ValueError, text) for name, (v, text) in own.items()
        ]
        return _common_refusals(device, dtype) + _refusals(cases)

    return inputs


NO_RANK = {"rank": (0, "rank: 0; .*at least 1"), "update_proj_gap": (0, "update_proj_gap: 0")}
NO_SUBSPACE = {
    **NO_RANK,
    "projector": ("qr", "Invalid projector: 'qr'.*randomized, svd, power"),
    "side": ("top", "Invalid side: 'top'.*auto, left, right"),
}
NO_LIMITER = {"limiter": (0.5, "Invalid limiter: 0.5; it must be >= 1")}

SCHEDULERS = (
    [],
    [lambda o: LinearLR(o, start_factor=0.5, total_iters=4)],
    [lambda o: CosineAnnealingLR(o, T_max=6)],
    [lambda o: ReduceLROnPlateau(o, patience=0)],
    [lambda o: StepLR(o, 3, 0.9), lambda o: ExponentialLR(o, 0.99), ReduceLROnPlateau],
    [lambda o: SequentialLR(o, [LinearLR(o, 0.5, total_iters=3), CosineAnnealingLR(o, 5)], [3])],
)

SCALE_INFO = OptimizerInfo(
    SCALE,
    optim_inputs_func=scale_inputs,
    optim_error_inputs_func=scale_error_inputs,
    scheduler_inputs=SCHEDULERS,
    supported_impls=("foreach", "differentiable"),
    has_capturable_arg=True,
    supports_complex=False,
)
MUON_INFO = OptimizerInfo(
    Muon,
    optim_inputs_func=partial(momentum_inputs, **MUONS_OWN),
    optim_error_inputs_func=muon_error_inputs,
    scheduler_inputs=SCHEDULERS,
    supported_impls=("foreach",),
    supports_complex=False,
)
RMNP_INFO = OptimizerInfo(
    RMNP,
    optim_inputs_func=momentum_inputs,
    optim_error_inputs_func=momentum_error_inputs,
    scheduler_inputs=SCHEDULERS,
    supported_impls=("foreach",),
    supports_complex=False,
)
MOMENTUM_INFOS = (MUON_INFO, RMNP_INFO)


class PlannedAdamS(AdamS):
    """AdamS with defaults for what a user has to plan; groups that it refuses take its Adam."""

    def __init__(self, params, lr=1e-3, *args, l1=1e-3, total_steps=8, n=1, m=1, **kwargs):
        super().__init__(params, lr, *args, l1=l1, total_steps=total_steps, n=n, m=m, **kwargs)

    def add_param_group(self, param_group):
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if not re.search("sparse=False in its group|keep float32 weights", str(error)):
                raise
            super().add_param_group({**param_group, "sparse": False})


def _zoo_info(cls, inputs, refusals) -> OptimizerInfo:
    return OptimizerInfo(
        cls,
        optim_inputs_func=(zoo_inputs if cls is PlannedAdamS else coded_inputs)(**inputs),
        optim_error_inputs_func=zoo_error_inputs(**refusals),
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach",),
        has_capturable_arg=cls in (StableSPAM, PlannedAdamS),
        supports_complex=False,
    )


ZOO = [
    _zoo_info(GaLore, {**SUBSPACES, **BOTH_SIDES}, NO_SUBSPACE),
    _zoo_info(
        NaturalGaLore,
        {
            **{name: {**kwargs, "history": 3} for name, kwargs in SUBSPACES.items()},
            "authors": {**LOW, "projector": "svd", "rotate": False, "side": "both"},
            "relative_damping": {**LOW, "relative_damping": True, "history_dtype": "bfloat16"},
        },
        {
            **NO_SUBSPACE,
            "history": (0, "Invalid history: 0; it must be at least 1"),
            "damping": (-1.0, "Invalid damping value: -1.0"),
            "history_dtype": ("int4", "Invalid history_dtype: 'int4'"),
        },
    ),
    _zoo_info(
        Fira,
        {**SUBSPACES, "paper": {**LOW, "residual_scale": "one", "limiter": 1.5}},
        {
            **NO_SUBSPACE,
            **NO_LIMITER,
            "side_": ("both", "Invalid side: 'both'.*auto, left, right$"),
            "residual_scale": ("two", "Invalid residual_scale: 'two'.*alpha, one"),
        },
    ),
    *[
        _zoo_info(
            cls,
            {
                "low_rank": {**LOW, "scale": 4.0},
                "tensor_in_front": {**LOW, "scale_type": "tensor", "scale_front": True},
                "channel": {**LOW, "scale_type": "channel", "limiter": 2.0, "seed": 3},
            },
            {
                **NO_RANK,
                **NO_LIMITER,
                "scale": (0.0, "Invalid scale: 0.0; it must be > 0"),
                "scale_type": ("row", "Invalid scale_type: 'row'.*channel, tensor"),
            },
        )
        for cls in (APOLLO, APOLLOMini)
    ],
    _zoo_info(
        SWAN,
        {"raw": {"rescale": False, "steps": 3}, "other_beta": {"beta": 0.8, "steps": 6}},
        {"steps": (0, "Invalid steps: 0"), "beta": (0.0, r"Invalid beta: 0.0; .* \(0, 1\]")},
    ),
    _zoo_info(
        SinkGD,
        {
            "once": {"iterations": 1},
            "unscaled": {"alpha": 1.0, "iterations": 8},
            "spectral": {"alpha": 1.0, "spectral_norm": True},
        },
        {
            "iterations": (0, "Invalid iterations: 0; it must be at least 1"),
            "alpha": (0.0, "Invalid alpha: 0.0; it must be > 0"),
        },
    ),
    _zoo_info(
        StableSPAM,
        {
            "resets": {"update_proj_gap": 2},
            "clean": {"update_proj_gap": 2, "reset_step": "clean"},
            "cosine": {"total_steps": 4, "gamma1": 0.85, "gamma2": 0.99999},
            "capturable": {"update_proj_gap": 2, "total_steps": 4, "capturable": True},
        },
        {
            "gamma1": (1.0, "Invalid gamma at index 0: 1.0"),
            "gamma3": (-0.5, "Invalid gamma at index 2: -0.5"),
            "update_proj_gap": (-1, "Invalid update_proj_gap: -1; .*0: no reset"),
            "total_steps": (0, "Invalid total_steps: 0"),
            "eta_min": (0.0, "Invalid eta_min: 0.0"),
            "reset_step": ("both", "Invalid reset_step: 'both'.*authors, clean"),
        },
    ),
    _zoo_info(
        PlannedAdamS,
        {
            "masks": {"n": 2, "m": 5, "mask_every": 2},
            "predecessor": {"n": 2, "m": 5, "mask_every": 2, "decay": "l2"},
            "ramp_over": {"n": 3, "m": 5, "total_steps": 1},
            "capturable": {"n": 2, "m": 5, "mask_every": 2, "capturable": True},
        },
        {
            "l1": (-1.0, "Invalid l1 value: -1.0"),
            "total_steps": (0, "Invalid total_steps: 0; it must be at least 1"),
            "mask_every": (0, "Invalid mask_every: 0; it must be at least 1"),
            "n": (2, "Invalid n:m: 2:1; n must be from 1 to m"),
            "decay": ("l3", "Invalid decay: 'l3'.*l1, l2"),
        },
    ),
]
OPTIM_DB = [SCALE_INFO, *MOMENTUM_INFOS, *ZOO]
