"""Base class of the optimizers: groups with roles, and state whose dtypes survive a load."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from optimzoo.core.adam import step_as_tensor
from optimzoo.core.compile import register, traced_step
from optimzoo.core.group_rates import GroupRates
from optimzoo.core.role_options import (
    RENAMED,
    RoleOptions,
    check_role_options,
    with_role_options,
)
from optimzoo.core.update import DECAY_STYLES
from optimzoo.core.validation import check_choice
from optimzoo.distributed import Shards, local_part, sum_packed
from optimzoo.flattened import refuse_flat_matrices
from optimzoo.lowbit import LOW, RngKey, next_rng_key
from optimzoo.roles import MATRIX_ROLES, check_role

# Python reads these: on a GPU each read would synchronize.
_ON_CPU = ("moment_step", "projector_seed")
# State that its rule computes in float32 at least.
_FLOAT32 = ("gram", "row_var", "col_var", "singular_vector")
# Values before the first step of what a step with a zero gradient changes: its counts, and the
# second moment, into which AdamS's decay goes. An infinite norm limits no update.
_UNTOUCHED = {"step": 0, "moment_step": 0, "exp_avg_sq": 0, "update_norm": math.inf}


class RoleOptimizer(Optimizer):
    """Torch optimizer whose groups carry a ``role`` and whose state survives a load unchanged.

    State holds tensors, ints and floats only, and none is made before the first step.
    """

    #: Position of the first parameter of `param_groups` among all, for rules that draw by position:
    #: `optimzoo.release` steps one parameter at a time.
    first_index = 0
    #: The roles that the method's own rule trains; the others take Adam.
    _matrix_roles: ClassVar[tuple[str, ...]] = ("hidden",)
    _role_options: dict[str, Any]
    #: What the constructor takes by `**options`.
    _options: ClassVar[type] = RoleOptions
    _warned_bare = False
    _looked_for_flat = False
    _rates: GroupRates

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[RoleOptions]
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} was given a module, {type(params).__name__}; "
                "give it optimzoo.param_groups(model)"
            )
        role_options = check_role_options(type(self).__name__, options, self._matrix_roles)
        for name, default in (("fused", None), ("weight_decay_style", "decoupled")):
            defaults.setdefault(name, role_options.pop(name, default))
        self._role_options = role_options
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does; the caller's dict is left alone.

        Raises:
            ValueError: an unknown role, a complex parameter, a matrix role for a vector, a
                parameter that FSDP1 or DeepSpeed has flattened.
        """
        group = self._with_role_options(copy_group(param_group))
        style = {**self.defaults, **group}["weight_decay_style"]
        check_choice("weight_decay_style", style, DECAY_STYLES)
        if isinstance(group.get("params"), Iterable):
            params = group["params"]
            if not isinstance(params, Tensor | set):
                group["params"] = list(params)
            self._check_group(group)
        super().add_param_group(group)
        self._group_rates().add(len(self.param_groups) - 1, self.param_groups[-1])
        self._register_traced()

    def _with_role_options(self, group: dict[str, Any]) -> dict[str, Any]:
        return with_role_options(group, self._role_options, self._matrix_roles)

    def _check_group(self, group: dict[str, Any]) -> None:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        named = [p for p in params if isinstance(p, tuple)]
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        names = [p[0] for p in named] or group.get("param_names", [])
        if not all(isinstance(t, Tensor) for t in tensors):
            return  # torch has the error for this
        check_role({"params": tensors, "role": group.get("role")}, names)
        if group.get("role") is None and tensors and not self._warned_bare:
            self._warned_bare = True
            warnings.warn(
                f"{type(self).__name__} was given bare parameters: those of two dimensions and up "
                "count as hidden weights, the rest as vectors; it cannot know the embedding, the "
                "output head or transposed weights. Use optimzoo.param_groups(model)",
                stacklevel=5,
            )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state as ``torch.optim.Optimizer`` does, but keep every state tensor's dtype.

        torch casts each state tensor to its parameter's dtype, which ruins masks, seeds, integer
        codes and float32 moments under bfloat16 weights. A state of float16 weights that is in
        float16 itself becomes float32 (Natural GaLore's history stays): it would underflow. So does
        one of a model in float64, under weights of 32 and 16 bits.

        Raises:
            ValueError: the groups differ in number, in size or in role from those of the state.
        """
        seen: dict[str, Any] = {}
        # The first runs after the caller's own hooks, on the state that they return; the other runs
        # before them, so that they see the final state.
        handles = [
            self.register_load_state_dict_pre_hook(
                lambda _, state: self._check_loaded(state, seen)
            ),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, seen: dict[str, Any]) -> None:
        saved_ids = chain.from_iterable(group["params"] for group in seen["param_groups"])
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for saved_id, (param, group) in zip(saved_ids, params, strict=True):
            for key, value in seen["state"].get(saved_id, {}).items():
                loaded = self.state[param].get(key)
                if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                    continue
                on_cpu = key in _ON_CPU and not group.get("capturable")
                device = torch.device("cpu") if on_cpu else loaded.device
                dtype = _loaded_dtype(key, value.dtype, param.dtype)
                if loaded.dtype != dtype or loaded.device != device:
                    self.state[param][key] = value.detach().to(device, dtype, copy=True)

    def _check_loaded(self, state_dict: StateDict, seen: dict[str, Any]) -> StateDict:
        roles = [group.get("role") for group in self.param_groups]
        saved = [group.get("role") for group in state_dict["param_groups"]]
        if len(roles) == len(saved):
            for i, (role, saved_role) in enumerate(zip(roles, saved, strict=True)):
                if role and saved_role and role != saved_role:
                    raise ValueError(
                        f"the state's group {i} has the role {saved_role!r} and this optimizer's "
                        f"has {role!r}; build the groups as they were when it was saved"
                    )
            # Options that an older state does not know, roles among them, stay as they are here.
            pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
            groups = [
                {k: v for k, v in group.items() if k not in ("params", "param_names")} | dict(new)
                for group, new in pairs
            ]
            state_dict = {**state_dict, "param_groups": groups}
        seen.update(state_dict)
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_role_options": self._role_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_role_options", {})
        for group in self.param_groups:
            for old, new in RENAMED.items():
                if old in group:
                    group[new] = group.pop(old)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            for p in group["params"]:  # a converted checkpoint may count the steps with a number
                step_as_tensor(self.state.get(p, {}), p, capturable=group.get("capturable", False))
        if "_rates" not in self.__dict__:  # a copy: it has the groups alone
            for index, group in enumerate(self.param_groups):
                self._group_rates().add(index, group)
        self._group_rates().resume()
        self._register_traced()

    def _group_rates(self) -> GroupRates:
        """Return the record of the groups' rates, created by the first group in the constructor."""
        rates: GroupRates = self.__dict__.setdefault("_rates", GroupRates())
        return rates

    def _register_traced(self) -> None:
        """Record what a traced step reads: this optimizer's number, and the groups' own lists."""
        self._traced = register(self), [group["params"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step; return the closure's loss, if there is a closure."""
        loss = self._run_closure(closure)
        if torch.compiler.is_dynamo_compiling():
            traced_step(*self._traced)
        else:
            self._step_once()
        return loss

    # Schedulers wrap a step to see that it is called, and no graph can hold their wrapper: marked
    # as wrapped it is left alone, and `_step_once` sets the flag that the wrapper would set.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step_once(self) -> None:
        self._opt_called = True
        if not self._looked_for_flat:  # a model may be wrapped after its optimizer is built
            refuse_flat_matrices(self.param_groups, MATRIX_ROLES)
            self._looked_for_flat = True
        self._rates.check(self.param_groups)
        trial = self._dcp_probe_params()
        self._update()
        self._undo_dcp_probe(trial)

    def _update(self) -> None:
        """Step all parameters by the method's rule, without a closure."""
        raise NotImplementedError

    def _count(self, group: dict[str, Any], first: int) -> dict[Tensor, RngKey]:
        """Count a stochastic rounding of each parameter with a gradient; return the keys.

        Rounding to nearest has none, nor has a float32 parameter without 8-bit moments.
        ``first`` is the index of the group's first parameter among all of the optimizer's.
        """
        if group["rounding"] == "nearest":
            return {}
        return {
            p: next_rng_key(self.state[p], seed=group["seed"], index=first + i)
            for i, p in enumerate(group["params"])
            if p.grad is not None and (p.dtype in LOW or group.get("state_bits") == 8)
        }

    def _run_closure(self, closure: Any) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _dcp_probe_params(self) -> list[Tensor]:
        """Return the parameters for which this step only creates the state.

        Before a load ``torch.distributed.checkpoint`` takes a step with gradients of zero and a
        learning rate of zero, to create the state that it loads into. If nothing is loaded then,
        training must go on as if that step had not been taken.
        """
        fresh: list[Tensor] = []
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                continue  # reading it would synchronize
            if lr == 0:
                with_grad = [p for p in group["params"] if p.grad is not None]
                fresh += [p for p in with_grad if not p.grad.is_sparse and not self.state.get(p)]
        if not fresh:
            return fresh
        grads = [local_part(p.grad, like=p) for p in fresh]  # type: ignore[arg-type]
        entries = [(g != 0).any().float().reshape(1) for g in grads]
        sum_packed(entries, [Shards.of(p) for p in fresh], ["smn"] * len(fresh))
        return [p for p, entry in zip(fresh, entries, strict=True) if not entry.item()]

    def _undo_dcp_probe(self, params: list[Tensor]) -> None:
        """Reset what a step with a gradient of zero has changed in the state."""
        for p in params:
            state = self.state[p]
            for key, value in _UNTOUCHED.items():
                if isinstance(state.get(key), Tensor):
                    local_part(state[key]).fill_(value)

    def _check_graph_capture(self) -> None:
        """Run torch's check of `capturable` under graph capture, which newer torch has renamed."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    def _refuse_sparse(self, grad: Tensor) -> None:
        if grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients; "
                "build the embedding with sparse=False"
            )


def _loaded_dtype(key: str, saved: torch.dtype, param: torch.dtype) -> torch.dtype:
    """Return the dtype in which a loaded state goes on, beside a parameter of dtype ``param``."""
    narrow = {param, saved} == {torch.float16} and key != "history"
    wide = saved == torch.float64 and param in (torch.float32, *LOW)  # of a model in float64
    coarse = saved in LOW and key in _FLOAT32
    return torch.float32 if narrow or wide or coarse else saved


def options_of(values: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the hyperparameters among the local variables of a constructor.

    So the signature alone lists them.
    """
    others = ("self", "params", "options", "rates", "__class__", *without)
    return {name: value for name, value in values.items() if name not in others}


def copy_group(param_group: Any) -> dict[str, Any]:
    """Return a shallow copy of a parameter group; raise torch's error if it is not a dict."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    return dict(param_group)


def scalar_lr(group: dict[str, Any]) -> float | Tensor:
    """Return the group's current learning rate as a float or a 0-dim tensor."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def signed_decay(group: Mapping[str, Any]) -> float:
    """Return a group's weight decay as rules and kernels take it: negative where it is cautious."""
    decay: float = group["weight_decay"]
    return -decay if group["weight_decay_style"] == "cautious" else decay
