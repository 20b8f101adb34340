"""Exact bytes of parameters, gradients and optimizer state, without allocating any of them."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from optimzoo.distributed import local_part
from optimzoo.memory.fake import Values
from optimzoo.memory.sharded import pretended_mesh, shard_of
from optimzoo.registry import create_optimizer
from optimzoo.roles import param_groups, role_of


@dataclass
class Account:
    """Bytes of one training setup: `params`, `grads`, and `state` by (role, state tensor)."""

    params: int = 0
    grads: int = 0
    state: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def state_total(self) -> int:
        """Return the bytes of the optimizer's state."""
        return sum(self.state.values())

    @property
    def total(self) -> int:
        """Return the bytes of parameters, gradients and state."""
        return self.params + self.grads + self.state_total


def account(
    model: nn.Module,
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer],
    *,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    **hyper: Any,
) -> Account:
    """Count the bytes that training ``model`` with ``optimizer`` holds between two steps.

    The optimizer creates its state by one step on meta tensors of the model's shapes. Nothing is
    allocated, and the model itself, which may be on ``meta``, is not touched.

    Args:
        model: any module.
        optimizer: a name of the registry, or a function from parameter groups to an optimizer.
        dtype: dtype of parameters and gradients; default: as the model has them.
        shards: processes that share everything under FSDP2; the bytes are those of the first,
            which has the most.
        **hyper: hyperparameters, where ``optimizer`` is a name.

    Raises:
        ValueError: an unknown optimizer or hyperparameter, shards below one.
    """
    if shards < 1:
        raise ValueError(f"Invalid shards: {shards}; it must be at least 1")
    mesh = None
    with ExitStack() as contexts:
        if shards > 1:
            mesh = contexts.enter_context(pretended_mesh(shards))
            contexts.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            contexts.enter_context(Values(lambda: True))
        return _account(model, optimizer, dtype, mesh, hyper)


def _account(
    model: nn.Module,
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer],
    dtype: torch.dtype | None,
    mesh: Any,
    hyper: dict[str, Any],
) -> Account:
    named = isinstance(optimizer, str)
    groups = param_groups(model)
    copies: dict[Tensor, int] = {}
    for group in groups:
        # The registry's optimizers hold equal state for equal tensors; others need not.
        shadows = _on_meta(group["params"], dtype, merge=named, mesh=mesh)
        group["params"] = list(shadows)
        copies |= shadows
        if named:
            del group["param_names"]
    if isinstance(optimizer, str):
        instance = create_optimizer(optimizer, groups, **hyper)
    else:
        instance = optimizer(groups)
    with _ZeroForValues():
        try:
            instance.step()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if mesh is None:
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{type(instance).__name__} does not step sharded weights: {first}; "
                "leave shards out"
            ) from error
    frozen = [p for p in model.parameters() if not p.requires_grad]
    sizes = [_first_part(p, mesh) * _itemsize(p, dtype) for p in frozen]
    result = Account(params=sum(sizes))
    for group in instance.param_groups:
        for p in group["params"]:
            result.params += copies[p] * _bytes(p)
            result.grads += copies[p] * _bytes(p)
            for name, value in instance.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    result.state[role_of(p, group), name] += copies[p] * _bytes(value)
    return result


def _bytes(tensor: Tensor) -> int:
    local = local_part(tensor)
    return local.numel() * local.element_size()


def _first_part(param: Tensor, mesh: Any) -> int:
    """Return the number of elements of a parameter's largest shard."""
    if mesh is None or param.ndim == 0:
        return param.numel()
    return -(-param.shape[0] // mesh.size()) * param[:1].numel()


def _on_meta(
    params: list[Tensor], dtype: torch.dtype | None, *, merge: bool, mesh: Any
) -> dict[Tensor, int]:
    """Return parameters on meta, with gradients, and how many of ``params`` each stands for."""
    by_layout: dict[Any, list[Tensor]] = {}
    for index, p in enumerate(params):
        by_layout.setdefault((p.shape, p.stride(), p.dtype) if merge else index, []).append(p)
    shadows: dict[Tensor, int] = {}
    for same_layout in by_layout.values():
        if mesh is not None:
            shadow = shard_of(same_layout[0], dtype or same_layout[0].dtype, mesh)
        else:
            shadow = nn.Parameter(torch.empty_like(same_layout[0], device="meta", dtype=dtype))
            shadow.grad = torch.empty_like(shadow)
        shadows[shadow] = len(same_layout)
    return shadows


def _itemsize(param: Tensor, dtype: torch.dtype | None) -> int:
    # As `model.to(dtype)`: quantised weights keep their integers.
    return (dtype if dtype and param.is_floating_point() else param.dtype).itemsize


class _ZeroForValues(TorchDispatchMode):
    """Dispatch mode in which a step that reads a value gets zero: a meta tensor has none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))
