"""Tracker of the live tensor bytes of running code, by category, and of their peak."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
ACTIVATIONS, BACKWARD = "activations", "backward temporaries"
TEMPORARIES, OTHER, WORKSPACES = "optimizer temporaries", "other", "library workspaces"
CATEGORIES = (PARAMETERS, GRADIENTS, STATE, ACTIVATIONS, BACKWARD, TEMPORARIES, OTHER, WORKSPACES)
MODEL, STEP = "forward and backward", "optimizer step"


@dataclass(frozen=True)
class Peak:
    """Most bytes at one time: in which phase, and by category."""

    bytes: int = 0
    phase: str = MODEL
    by_category: dict[str, int] = field(default_factory=dict)

    def plus(self, category: str, more: int) -> "Peak":
        """Return the peak with ``more`` bytes of ``category`` added."""
        if not more:
            return self
        parts = dict(self.by_category)
        parts[category] = parts.get(category, 0) + more
        return Peak(self.bytes + more, self.phase, parts)


class _Storage:
    """One storage: its bytes, and its category as far as that is known."""

    __slots__ = ("bytes", "category", "reference")

    def __init__(self, bytes_: int, category: str, reference: Any) -> None:
        self.bytes, self.category, self.reference = bytes_, category, reference


class Tracker(TorchDispatchMode):
    """Dispatch mode that counts the live storages of real and fake tensors while it is entered.

    A storage counts from the operation that made it (those that exist already from the beginning)
    until its last tensor is gone. What an operation holds only inside itself is not seen.

    Attributes:
        now: bytes at this moment.
        block: sizes are rounded up to a multiple of it (CUDA's allocator: 512).
    """

    def __init__(self, *, block: int = 1) -> None:
        super().__init__()
        self.now, self.block = 0, block
        self._live: dict[int, _Storage] = {}
        self._most = {MODEL: 0, STEP: 0}
        self._at_most: dict[str, list[_Storage]] = {MODEL: [], STEP: []}
        self._rising: str | None = None
        self._depth = 0
        self._parameters = WeakIdKeyDictionary()
        self._handles: list[Any] = []
        self._resize: Any = None

    @property
    def stepping(self) -> bool:
        """Return whether an optimizer's ``step`` is running."""
        return self._depth > 0

    def __enter__(self) -> "Tracker":
        self._handles += [
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        # FSDP2 frees and refills its gathered weights by this, which is not dispatched.
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizer()  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settle()

    def count_existing(self) -> None:
        """Count every existing tensor; find parameters, gradients and state by the optimizers."""
        gc.collect()
        objects = [o for o in gc.get_objects() if issubclass(type(o), (Tensor, Optimizer))]
        self.count([o for o in objects if isinstance(o, Tensor) and not isinstance(o, FakeTensor)])
        for optimizer in (o for o in objects if isinstance(o, Optimizer)):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if not any(isinstance(p, FakeTensor) for p in params):  # of a simulation
                self._learn(optimizer)

    def count(self, tensors: Iterable[Tensor], category: str = OTHER) -> None:
        """Count tensors that were made elsewhere; set the category of known ones."""
        for tensor in tensors:
            for storage in _storages(tensor):
                record = self._live.get(storage._cdata)
                if record is not None:
                    record.category = record.category if category == OTHER else category
                else:
                    self._add(storage, category)
            if isinstance(tensor, nn.Parameter):
                self._watch(tensor)

    def peak(self, phase: str | None = None) -> Peak:
        """Return the peak of a phase, `forward and backward` or `optimizer step`, or of both."""
        self._settle()
        phase = phase or max(self._most, key=lambda name: self._most[name])
        parts: Counter[str] = Counter()
        for storage in self._at_most[phase]:
            parts[storage.category] += storage.bytes
        by_category = {name: parts[name] for name in CATEGORIES if parts[name]}
        return Peak(self._most[phase], phase, by_category)

    def bracket(self, parameters: Iterable[Tensor], attach: Callable[[], Any]) -> None:
        """Count as an optimizer step what the gradient hooks do that ``attach()`` registers."""
        parameters = [p for p in parameters if p.requires_grad]

        def hook(more: int) -> Callable[[Tensor], None]:
            def change(_: Tensor) -> None:
                self._depth += more

            return change

        for p in parameters:
            self._handles.append(p.register_post_accumulate_grad_hook(hook(1)))
        attach()
        for p in parameters:
            self._handles.append(p.register_post_accumulate_grad_hook(hook(-1)))

    def held(self, optimizer: Optimizer) -> int:
        """Return the bytes of an optimizer's state, as they are counted here."""
        tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        keys = {storage._cdata for tensor in tensors for storage in _storages(tensor)}
        return sum(self._live[key].bytes for key in keys if key in self._live)

    def restart(self) -> None:
        """Forget the peaks; both phases begin with what is live now."""
        self._most = dict.fromkeys(self._most, self.now)
        self._at_most = {phase: list(self._live.values()) for phase in self._most}
        self._rising = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(_wraps(tensor_type) for tensor_type in types):
            return NotImplemented  # the wrapper's own operations come here by themselves
        kwargs = kwargs or {}
        for value in _tensors((args, kwargs)):
            if type(value) is nn.Parameter and value not in self._parameters:
                self.count([value], PARAMETERS)
            elif any(storage._cdata not in self._live for storage in _storages(value)):
                self.count([value])
        result = func(*args, **kwargs)
        category = self._category()
        for storage in (s for tensor in _tensors(result) for s in _storages(tensor)):
            record = self._live.get(storage._cdata)
            if record is None:
                self._add(storage, category)
            else:
                self._measure_again(record, storage)
        return result

    def _resizer(self) -> Callable[..., Any]:
        resize = self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            record = self._live.get(storage._cdata)
            if record is not None:
                self._measure_again(record, storage)
            return result

        return resize_

    def _measure_again(self, record: _Storage, storage: torch.UntypedStorage) -> None:
        more = self._round(storage.nbytes()) - record.bytes
        if more:
            self._change(record, more)

    def _category(self) -> str:
        if self.stepping:
            return TEMPORARIES
        # In a backward pass gradients are enabled only where a checkpoint runs forward again.
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        return BACKWARD if in_backward else ACTIVATIONS

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            dead = self._live[key]
            self._settle()
            del self._live[key]
            self.now -= dead.bytes

        record = _Storage(0, category, weakref.ref(storage, gone))
        self._live[key] = record
        self._change(record, self._round(storage.nbytes()))

    def _change(self, record: _Storage, more: int) -> None:
        phase = STEP if self.stepping else MODEL
        if more < 0 or self._rising not in (None, phase):
            self._settle()
        record.bytes += more
        self.now += more
        if self.now > self._most[phase]:
            self._most[phase] = self.now
            self._rising = phase

    def _settle(self) -> None:
        """Record the storages of a new peak, which is only needed once bytes go down again."""
        if self._rising is not None:
            self._at_most[self._rising] = list(self._live.values())
            self._rising = None

    def _round(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def _watch(self, parameter: Tensor) -> None:
        if parameter in self._parameters:
            return
        self._parameters[parameter] = True
        self._label([parameter], PARAMETERS)
        if parameter.requires_grad and parameter.is_leaf:
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self._label([p.grad], GRADIENTS)
                )
            )

    def _label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        for tensor in tensors:
            for storage in _storages(tensor) if tensor is not None else ():
                record = self._live.get(storage._cdata)
                if record is not None:
                    record.category = category

    def _learn(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            self.count(group["params"], PARAMETERS)
            self._label((p.grad for p in group["params"]), GRADIENTS)
        for state in optimizer.state.values():
            self.count((v for v in state.values() if isinstance(v, Tensor)), STATE)

    def _begin_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.stepping:
            self._learn(optimizer)
        self._depth += 1

    def _end_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth -= 1
        self._learn(optimizer)


def _wraps(tensor_type: type) -> bool:
    """Return whether tensors of this type hold others, as a DTensor does."""
    return hasattr(tensor_type, "__tensor_flatten__") and hasattr(
        tensor_type, "__tensor_unflatten__"
    )


def _tensors(values: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    if _wraps(type(tensor)):
        names = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        parts = (getattr(tensor, name) for name in names)  # a DTensor names its mesh, too
        return [s for part in parts if isinstance(part, Tensor) for s in _storages(part)]
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return []
    return [tensor.untyped_storage()]
