"""Count of the operations that a step dispatches: on a GPU, about as many launches."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# A view of a product, and no operation on a tensor.
_FREE = ("aten::_unsafe_view", "aten::promote_types")


class Operations(TorchDispatchMode):
    """Dispatch mode that counts torch's operations, without views and without kernels of ours.

    Attributes:
        count: operations so far.
        reads: those of them in which Python reads a number from a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name
        self.count += name.startswith("aten::") and not views and name not in _FREE
        self.reads += name == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def operations(step: Callable[[], Any]) -> int:
    """Return the number of operations that a call dispatches."""
    with Operations() as counted:
        step()
    return counted.count
