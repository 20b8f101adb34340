"""Stacks: several weights of one shape computed as one tensor, with their state.

On a GPU the operations on a small matrix are shorter than their launches. A stack has at most
`STACK` elements, so what it takes beside the weights is bounded: a few tensors of that size.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

State = MutableMapping[str, Any]
STACK = 1 << 25  # elements: 128 MiB in float32
# Other tensor subclasses know best how they are stepped.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
NEW = -1  # version of a tensor that a rule has put into a stack of states


def on_gpu(matrix: Tensor) -> bool:
    """Return whether a tensor is on a GPU, where weights are stepped in stacks by default."""
    return matrix.is_cuda


def stackable(matrix: Tensor, foreach: bool | None) -> bool:
    """Return whether a matrix may be one of a stack: two fit, and ``foreach`` or the GPU asks."""
    wanted = on_gpu(matrix) if foreach is None else foreach
    return wanted and type(matrix) in _PLAIN and matrix.ndim > 1 and 0 < 2 * matrix.numel() <= STACK


def batches(keys: Iterable[Hashable | None], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Yield the indices of equal keys, of bounded size; an index whose key is None is alone.

    Args:
        keys: one for each matrix.
        size: returns the number of elements of a matrix's largest tensor.
    """
    by_key: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        by_key.setdefault((None, i) if key is None else (key,), []).append(i)
    for indices in by_key.values():
        most = max(1, STACK // max(1, size(indices[0]))) if len(indices) > 1 else 1
        yield from (indices[at : at + most] for at in range(0, len(indices), most))


def batch_by_shape(
    rule: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], foreach: bool | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``rule`` of each matrix with its index; take those of one shape together.

    One stack is held at a time.

    Args:
        rule: takes ``[..., m, n]``.
        matrices: tensors of any shapes.
        foreach: True stacks everywhere, False nowhere, None on a GPU.
    """
    keys = [(x.shape, x.dtype, x.device) if stackable(x, foreach) else None for x in matrices]
    for indices in batches(keys, lambda i: matrices[i].numel()):
        if len(indices) == 1:
            yield indices[0], rule(matrices[indices[0]])
        else:
            stack = torch.stack([matrices[i] for i in indices])
            yield from zip(indices, rule(stack).unbind(), strict=True)


def in_chunks(rule: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Return ``rule`` of ``[..., m, n]``, of as many matrices at a time as a stack may have."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    most = max(1, STACK // max(1, flat[:1].numel()))
    if len(flat) <= most:
        return rule(matrices)
    results: Tensor | None = None
    for at in range(0, len(flat), most):
        part = rule(flat[at : at + most])
        results = part.new_empty(flat.shape) if results is None else results
        results[at : at + most] = part
    return results.view(matrices.shape)  # type: ignore[union-attr]


class StateStack(MutableMapping[str, Any]):
    """State of ``k`` weights whose tensors are stacked to ``[k, ...]`` when a rule reads them.

    Each weight keeps tensors of its own: :meth:`write_back` copies what the rule has changed.

    Args:
        states: the weights' states, which have the same keys.
        numbers: keys of one number a matrix: 0-dim in a weight's state, ``[k, 1, 1]`` here.
    """

    def __init__(self, states: Sequence[State], numbers: Sequence[str] = ()) -> None:
        self.states = states
        self.numbers = numbers
        self._stacks: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._stacks:
            stack = torch.stack(each(self, key))
            number = key in self.numbers and stack.ndim == 1
            self._stacks[key] = stack.view(-1, 1, 1) if number else stack
            self.versions[key] = self._stacks[key]._version
        return self._stacks[key]

    def read_together(self, *keys: str) -> list[Tensor]:
        """Return the stacks of keys, in one tensor where all are of one shape and dtype.

        Such as a rule's moments: what changes one of them changes the other.
        """
        tensors = [t for key in keys for t in each(self, key)]
        new = not any(key in self._stacks for key in keys)
        if new and len({(t.shape, t.dtype, t.device) for t in tensors}) == 1:
            for key, stack in zip(keys, torch.stack(tensors).chunk(len(keys)), strict=True):
                self._stacks[key], self.versions[key] = stack, stack._version
        return [self[key] for key in keys]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._stacks[key] = value
        self.versions[key] = NEW

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key} cannot be deleted from a stack of states; refresh() may do that")

    def __contains__(self, key: object) -> bool:
        return key in self._stacks or key in self.states[0]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.states[0], **self._stacks})

    def __len__(self) -> int:
        return len({**self.states[0], **self._stacks})

    def write_back(self) -> None:
        """Copy changed tensors into the states that they are of, and new ones beside them."""
        changed: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for key, stack in self._stacks.items():
            if stack._version == self.versions[key]:
                continue
            number = key in self.numbers and stack.ndim == 3
            parts = list((stack.view(-1) if number else stack).unbind())
            old = self.states[0].get(key)
            if old is not None and (old.dtype, old.shape) == (parts[0].dtype, parts[0].shape):
                targets, sources = changed.setdefault(old.dtype, ([], []))
                targets += [state[key] for state in self.states]
                sources += parts
            else:
                for state, part in zip(self.states, parts, strict=True):
                    state[key] = part.clone()  # of its own: a checkpoint saves whole storages
        for targets, sources in changed.values():  # in one launch, if they are of one dtype
            torch._foreach_copy_(targets, sources)


def moments_of(state: State) -> list[Tensor]:
    """Return Adam's moments of a weight or of a stack of weights."""
    keys = ("exp_avg", "exp_avg_sq")
    return state.read_together(*keys) if isinstance(state, StateStack) else [state[k] for k in keys]


def each(state: State, key: str) -> list[Tensor]:
    """Return the tensors of one key: of each weight of a stack, or of the one weight.

    What is written to them before the rule reads ``state[key]`` is written to the weights' states.
    """
    if not isinstance(state, StateStack):
        return [state[key]]
    if state.versions.get(key) == NEW:
        return list(state[key].unbind())
    return [s[key] for s in state.states]
