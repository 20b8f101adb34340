"""Optimizer-in-backward: each gradient is applied and freed as soon as it is complete."""

import gc
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from optimzoo.flattened import flattened_by
from optimzoo.gradient_stabilizer import stabilizer_of


def release(
    optimizer: Optimizer, *, max_norm: float | None = None, scaler: Any = None
) -> "Release":
    r"""Step each parameter during the backward, as soon as its gradient is complete, and free it.

    The training loop stays as it is; ``optimizer.step()`` takes what is left and ends the round::

        released = optimzoo.release(optimizer)
        for batch in batches:
            loss(batch).backward()      # here the weights move
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    Without `max_norm` the weights get the same bits as without release, for every method whose step
    treats each parameter by itself; no gradient is left after the backward. Gradients must be
    final when the backward delivers them: no ``clip_grad_norm_``, no averaging by hand after it.

    **Clipping**, with g all gradients: ``g ← g · min(1, max_norm / (‖g‖ + 1e-6))``, as
    ``clip_grad_norm_``. ‖g‖ is known when the last gradient is, so only steps that do not depend on
    it can be taken before: those of parameters for which ``optimizer.scale_invariant(param,
    group)`` is true (SCALE's matrices without momentum; a method that has no such function has no
    such parameter). The others wait for ``optimizer.step()``. This is exact, up to rounding, where
    the clipped gradient stays above the method's eps: SCALE divides by ``max(s, eps)``, and a row
    with ``s · min(…) < eps`` moves further than it would. Decoupled weight decay does not matter.

    **Loss scaling**: gradients are divided by the scale as they come. Where torch skips the whole
    step because some gradient is not finite, here the parameters whose own gradients are finite
    have been stepped, the others (and those that wait) keep weights and state; the scale falls as
    always. Each gradient's check waits for its device.

    **Accumulation**: a parameter takes one gradient a round, so a second backward is refused; take
    all but the last under :meth:`Release.paused`, where gradients accumulate, unfreed, as ever.

    Under ``torch.compile`` of the whole model all gradients come at once, and none is saved.

    Args:
        optimizer: any of this library or of torch, LBFGS excepted. Its state, ``state_dict``, lr
            (read at each step) and closures stay what they are.
        max_norm: largest norm of this optimizer's gradients; `math.inf` measures without clipping.
        scaler: the ``torch.amp.GradScaler`` that scales the loss.

    Returns:
        A :class:`Release`, whose ``remove()`` undoes this; it is a context manager, too.

    Raises:
        TypeError: not a torch optimizer, or a wrapper around one.
        ValueError: LBFGS; parameters that are released already; `max_norm` for a method none of
            whose parameters are scale-invariant, or for an optimizer that is stabilized.
        RuntimeError: parameters of DistributedDataParallel or of FSDP1 (FSDP2's are fine); in a
            backward, a second gradient for a parameter that was stepped, float16 gradients with
            `scaler`, an optimizer that is gone (it lives as long as something holds it or this).
    """
    return Release(optimizer, max_norm, scaler)


class _Hook:
    """Gradient hook with a weak reference, as a garbage collector does not look into hooks."""

    def __init__(self, owner: "Release") -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is None:
            raise RuntimeError(
                f"the optimizer that a parameter {tuple(param.shape)} was released to is gone; "
                "keep it, or end the release before with remove()"
            )
        owner._on_gradient(param)


class Release:
    """Handle of a released optimizer, as :func:`release` returns it.

    Attributes:
        grad_norm: with `max_norm`, the gradients' norm at the last ``optimizer.step()``.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float | None, scaler: Any) -> None:
        _check(optimizer, max_norm)
        self.max_norm, self.grad_norm = max_norm, torch.zeros(())
        self._optimizer, self._scaler = optimizer, scaler
        step: Any = type(optimizer).step
        # Without the step hooks: those of the user run once a round.
        self._rule = step.__wrapped__ if getattr(step, "hooked", False) else step
        self._places: dict[Tensor, tuple[int, int]] = {}  # group, and position among all
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                self._places[p] = (number, len(self._places))
        self._lock = threading.Lock()  # there is an autograd thread per device
        self._paused = False
        self._checked = False
        self._begin()
        self._handles = [
            p.register_post_accumulate_grad_hook(_Hook(self))
            for p in self._places
            if p.requires_grad
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._begin()))
        if scaler is not None:
            self._join_scaler()

    def _begin(self) -> None:
        """Begin a new round, in which no parameter has been stepped."""
        self._stepped: set[Tensor] = set()
        self._norms: list[Tensor] = []
        self._inverses: dict[torch.device, Tensor] = {}
        self._found_inf: dict[torch.device, Tensor] = {}
        self._over = False

    def remove(self) -> None:
        """Undo the release, between two steps: gradients stay until ``optimizer.step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._scaler is not None:
            self._leave_scaler()

    def __enter__(self) -> "Release":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let gradients accumulate, in every backward of a round but the last."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def discard(self) -> None:
        """End a round whose backward raised: waiting gradients are dropped, steps taken stay."""
        self._optimizer.zero_grad()
        self._begin()

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        if self._paused or param.grad is None:
            return
        with self._lock:
            if self._over:
                self._begin()
            if not self._checked:
                _refuse_replicated(self._places)  # the model may be wrapped by now
                _refuse_stabilized(self._optimizer, self.max_norm)
                self._checked = True
            if param in self._stepped:
                param.grad = None
                raise RuntimeError(_second_gradient(param))
            number, position = self._places[param]
            group = self._optimizer.param_groups[number]
            if self.max_norm is not None and not _scale_invariant(self._optimizer, param, group):
                return  # it waits for the norm
            if self._unscale(param):
                if self.max_norm is not None:
                    self._norms.append(_norm(param.grad))
                self._step(param, group, position)
            self._stepped.add(param)
            param.grad = None

    def _step(self, param: Tensor, group: dict[str, Any], position: int) -> None:
        """Run the optimizer's own step on a shallow copy that has this parameter alone.

        State is shared, options are the group's current ones. What a step counts in a group or on
        the optimizer is lost with the copy; ``optimizer.step()`` counts it, once per round.
        """
        alone = object.__new__(type(self._optimizer))
        alone.__dict__.update(self._optimizer.__dict__)
        alone._optimizer_step_pre_hooks = OrderedDict()
        alone._optimizer_step_post_hooks = OrderedDict()
        alone.param_groups = [{**group, "params": [param]}]
        alone.__dict__["first_index"] = position
        stabilizer = stabilizer_of(self._optimizer)
        if stabilizer is not None:
            stabilizer.before_step(alone, (alone,), {})
        self._rule(alone)
        if stabilizer is not None:
            stabilizer.after_step(alone)

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip the waiting gradients to ``max_norm`` by the norm of all, the released included."""
        groups = self._optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        # A scaler leaves unscaling to an optimizer that says so: these gradients are scaled.
        scale = getattr(self._optimizer, "grad_scale", None)
        waiting = [_norm(g) if scale is None else _norm(g) / scale.to(g.device) for g in grads]
        norms = self._norms + waiting
        if self.max_norm is None or not norms:
            return
        device = norms[0].device
        norm: Any = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
        factor = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip()
            return None

        def evaluate() -> Any:
            loss = closure()
            self._clip()
            return loss

        return (args[0], evaluate), {k: v for k, v in kwargs.items() if k != "closure"}

    # Loss scaling.

    def _unscale(self, param: Tensor) -> bool:
        """Divide the gradient by the loss scale, if there is one; return whether it is finite."""
        grad = param.grad
        if grad is None or self._scaler is None or not self._scaler.is_enabled():
            return True
        if grad.dtype == torch.float16:
            raise RuntimeError(
                "float16 gradients cannot be unscaled; keep float32 weights and use autocast"
            )
        device = grad.device
        if device not in self._inverses:
            one = torch.ones((), device=device)
            self._inverses[device] = one / self._scaler.scale(one)
            self._found_inf.setdefault(device, torch.zeros((), device=device))
        grad.mul_(self._inverses[device])
        finite = grad.numel() == 0 or bool(torch.linalg.vector_norm(grad, math.inf).isfinite())
        if not finite:
            self._found_inf[device].fill_(1.0)
        return finite

    def _join_scaler(self) -> None:
        """Report infinities to the scaler, which no longer sees the released gradients."""
        self._unscale_rest = self._scaler._unscale_grads_
        self._scaler._unscale_grads_ = self._unscale_grads
        # A fused torch optimizer leaves unscaling to its kernel: not that of gradients that wait.
        self._scales_itself = self._optimizer.__dict__.pop("_step_supports_amp_scaling", None)

    def _leave_scaler(self) -> None:
        if self._scaler.__dict__.get("_unscale_grads_") == self._unscale_grads:
            del self._scaler._unscale_grads_
            if self._unscale_rest != self._scaler._unscale_grads_:  # another release's
                self._scaler._unscale_grads_ = self._unscale_rest
        if self._scales_itself is not None:
            self._optimizer.__dict__["_step_supports_amp_scaling"] = self._scales_itself

    def _unscale_grads(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        found_inf = self._unscale_rest(optimizer, *args, **kwargs)
        if optimizer is not self._optimizer or not self._handles:
            return found_inf
        self._over = True  # the scaler may skip the step
        for device, released in self._found_inf.items():
            found_inf[device] = (
                torch.maximum(found_inf[device], released) if device in found_inf else released
            )
        return found_inf


def _scale_invariant(optimizer: Optimizer, param: Tensor, group: dict[str, Any]) -> bool:
    rule = getattr(optimizer, "scale_invariant", None)
    return rule is not None and bool(rule(param, group))


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))


def _second_gradient(param: Tensor) -> str:
    return (
        f"a second gradient for a parameter {tuple(param.shape)} that has been stepped; call "
        "optimizer.step() after each backward, or accumulate: all backwards but the last under "
        "released.paused(). After a backward that raised, released.discard(). Reentrant "
        "checkpoints of shared weights give two gradients: use_reentrant=False gives one"
    )


def _check(optimizer: Optimizer, max_norm: float | None) -> None:
    """Refuse an optimizer, or parameters, that cannot be released."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"release takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
    name = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(f"{name} wraps an optimizer; release that one, before it is wrapped")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS steps all parameters together: they cannot be released one by one")
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for p, _ in params:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            if hooks[key].owner() is not None:
                raise ValueError(f"{name}'s parameters are released already; call remove() on that")
            del hooks[key]
        if flattened_by(p):
            raise RuntimeError("FSDP1 reduces a gradient after its hooks; use fully_shard (FSDP2)")
    _refuse_replicated(dict(params))
    _refuse_stabilized(optimizer, max_norm)
    if max_norm is None:
        return
    if not max_norm > 0:
        raise ValueError(f"Invalid max_norm: {max_norm}; it must be > 0")
    if not any(_scale_invariant(optimizer, p, group) for p, group in params):
        raise ValueError(
            f"{name} cannot clip what it releases: the norm is known when the last gradient is, "
            "and all its steps depend on the gradients' size; release it without max_norm, or clip "
            "without release"
        )


def _refuse_stabilized(optimizer: Optimizer, max_norm: float | None) -> None:
    """Refuse clipping: the running norms of gradients that go at once would be unclipped ones."""
    if max_norm is not None and stabilizer_of(optimizer) is not None:
        raise ValueError(
            f"max_norm={max_norm} of a stabilized {type(optimizer).__name__}: it bounds "
            "each gradient's norm by itself; release it without max_norm"
        )


def _refuse_replicated(params: dict[Tensor, Any]) -> None:
    """Refuse DistributedDataParallel: its hooks come after, and it keeps every gradient anyway."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.nn.parallel import DistributedDataParallel

    for module in gc.get_objects():  # it leaves no mark on its parameters
        if issubclass(type(module), DistributedDataParallel) and any(
            p in params for p in module.parameters()
        ):
            raise RuntimeError(
                "DistributedDataParallel averages gradients after they are released, and its "
                "buckets keep them all, so nothing would be freed; use fully_shard (FSDP2)"
            )
