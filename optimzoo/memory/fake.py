"""Modules and optimizer steps on shapes alone: fake tensors, and values where code asks for one."""

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

from optimzoo import stacks
from optimzoo.kernels import dispatch, native


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of ``module`` whose parameters and buffers are fake tensors on the CPU.

    As under ``module.to(dtype)``, floating-point ones take ``dtype``.
    """
    copies: dict[int, Any] = {}
    with mode:
        for tensor in chain(module.parameters(), module.buffers()):
            if id(tensor) in copies:
                continue
            fake_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            fake: Tensor = torch.empty_like(tensor, dtype=fake_dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = fake
        return copy.deepcopy(module, copies)


class Values(TorchDispatchMode):
    """Dispatch mode that gives values to code that reads one: a fake tensor has none.

    A float reads as one, which is finite and not zero, a bool as true, and an integer as zero,
    since that is mostly the status of a factorisation.
    While ``computes()``, single elements are real tensors, so that an optimizer's counters count.
    """

    def __init__(self, computes: Callable[[], bool]) -> None:
        super().__init__()
        self.computes = computes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return _value(args[0].dtype)
        if func is torch.ops.aten._grouped_mm.default and _is_fake(args[0]):
            return _grouped_mm(func, args, kwargs)
        if not self.computes():
            return func(*args, **kwargs)
        fake = tree_any(_is_fake, (args, kwargs))
        if not fake and tree_any(_is_real, (args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        generator = kwargs.pop("generator", None)
        result = func(*args, **kwargs, **({"generator": None} if generator else {}))
        if func._schema.is_mutable or _is_view(func):
            return result
        return tree_map(lambda t: _made_real(t, func) if _is_fake(t) else t, result)


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the product of mixture-of-experts weights, whose shapes torch gives in bf16 alone."""
    half = [a.bfloat16() if _is_fake(a) and a.is_floating_point() else a for a in args]
    product: Tensor = func(*half, **kwargs)
    return product.to(args[0].dtype)


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _value(dtype: torch.dtype) -> Any:
    return dtype.is_floating_point * 1.0 if dtype.is_floating_point else dtype is torch.bool


def _made_real(fake: Tensor, func: Any) -> Tensor:
    if fake.numel() != 1:
        return fake
    value = 0 if "zeros" in func.__name__ else _value(fake.dtype)
    with unset_fake_temporarily():
        return torch.full(fake.shape, value, dtype=fake.dtype)


@contextmanager
def cuda_choices() -> Iterator[None]:
    """Make torch and the kernels choose for fake tensors of the CPU as they would on a GPU.

    That is multi-tensor steps by default, a kernel for everything that kernels take, and stacks of
    matrices.
    """
    optim = importlib.import_module("torch.optim.optimizer")  # no attribute of torch.optim
    with _replaced(
        (optim, "_foreach_supported_types", [*optim._foreach_supported_types, FakeTensor]),
        (optim, "_get_foreach_kernels_supported_devices", lambda: ["cpu", "cuda"]),
        (dispatch, "_backend", lambda device_type: native.CPU),
        (stacks, "on_gpu", lambda matrix: True),
    ):
        yield


@contextmanager
def as_in_training() -> Iterator[None]:
    """Make transformers build what it builds of real tensors, for fake ones too.

    It takes fake tensors for those of an export, and then writes attention masks out that training
    leaves to the attention kernel.
    """
    module = sys.modules.get("transformers.utils.import_utils")
    with _replaced((module, "is_fake_tensor", lambda tensor: False)):
        yield


@contextmanager
def _replaced(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of modules for a time; those that a module does not have are left out."""
    with ExitStack() as stack:
        for module, name, value in attributes:
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
