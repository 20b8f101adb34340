"""What a rule for matrices is: how an update follows from a gradient and the weight's state."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from optimzoo.core.update import Update
from optimzoo.distributed import Shards
from optimzoo.lowbit import RngKey, dequantized_moments
from optimzoo.stacks import State


class Context(NamedTuple):
    """What a rule reads beside the gradient, the state and the options.

    Attributes:
        step: the step's number, from 1; with `capturable` a tensor on the device, ``[k, 1, 1]`` in
            a stack, but for `refresh`, which gets the number.
        position: the weight's among all of the optimizer's, for rules that draw.
        shards: how the weight is sharded.
        weight: the weight, if it is stepped alone; None in a stack.
    """

    step: Any
    position: int
    shards: Shards
    weight: Tensor | None


class Matrix(NamedTuple):
    """A parameter with a gradient; this process's part of both as matrices."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    state: State
    shards: Shards
    position: int
    step: Any  # a number; with `capturable` a tensor

    @contextmanager
    def opened_state(
        self, dims: Mapping[str, str], group: dict[str, Any], rng_key: RngKey | None
    ) -> Iterator[State]:
        """Yield this process's part of the state, with moments in place of 8-bit codes."""
        with ExitStack() as stack:
            if group["state_bits"] == 8:
                stack.enter_context(dequantized_moments(self.state, 8, rng_key))
            yield stack.enter_context(self.shards.local_state(self.state, dims))


class Rule:
    """Rule by which matrices are stepped, alone or several of one shape as a stack.

    A subclass defines :meth:`direction`; learning rate, decay and rounding are not its business.
    """

    #: Whether each weight's steps are counted, in ``state["step"]``.
    counts_steps: ClassVar[bool] = True
    #: Keys of the state with one number a matrix.
    numbers: ClassVar[tuple[str, ...]] = ()

    def direction(
        self, grad: Tensor, state: State, group: dict[str, Any], context: Context
    ) -> Update:
        """Return the update of a gradient ``[..., m, n]``, and change the state.

        Args:
            grad: the gradient as a matrix, or those of several weights of one shape in a stack; of
                a sharded weight, what this process has.
            state: the weight's state, or a :class:`StateStack`.
            group: the options.
            context: step count, sharding, and the weight if it is stepped alone.
        """
        raise NotImplementedError

    def init_state(self, p: Tensor, state: State, group: dict[str, Any]) -> None:
        """Create state of a weight's layout where it is missing."""

    def state_dims(self, group: dict[str, Any], shape: torch.Size) -> dict[str, str]:
        """Return by key which dimensions of a state tensor are the weight's.

        Named as in :meth:`optimzoo.distributed.Shards.to_dtensor`.
        """
        return {}

    def refresh_due(self, state: State, group: dict[str, Any], step: int) -> bool:
        """Return whether :meth:`refresh` comes before the direction in this step."""
        return False

    def refresh(self, grad: Tensor, state: State, group: dict[str, Any], context: Context) -> None:
        """Renew what is computed from one gradient now and then, such as a subspace."""


def take_into_average(grad: Tensor, mean: Tensor, beta: float, *, nesterov: bool) -> Tensor:
    """Take a gradient of its average's dtype into it, in place; return that, or Nesterov's."""
    mean.lerp_(grad, 1 - beta)
    return grad.lerp(mean, beta) if nesterov else mean


def averaged(
    grad: Tensor, mean: Tensor, beta: float, group: dict[str, Any], *, nesterov: bool = False
) -> Tensor:
    """Take a gradient into its average, in place; return that, or Nesterov's, as a matrix.

    Args:
        grad: the gradient, as a matrix.
        mean: the average, laid out as the weight is.
        beta: decay rate of the average.
        group: the options.
        nesterov: look ahead by taking the gradient in once more.
    """
    turned = group["transposed"] and mean.ndim == grad.ndim  # a convolution's has more
    oriented_grad = (grad.mT if turned else grad).reshape(mean.shape).to(mean.dtype)
    update = take_into_average(oriented_grad, mean, beta, nesterov=nesterov)
    return (update.mT if turned else update).reshape(grad.shape)
