"""Native kernel libraries for CPU and CUDA, called through their plain C interface.

``csrc/include/optimzoo.h`` specifies each function; the Triton backend has the same ones. Lists
have one entry per tensor. Tensors are dense ``[rows, cols]``, by ``shapes``, and on one device; a
state that a tensor does not have is None.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optimzoo.kernels.table import TYPES, Rate, Shapes, States, Table, Tensors

_ABI = 10
_ROWS, _COLUMNS, _SIGN, _ADAM = range(4)


class _Options(ctypes.Structure):
    """Structure ``oz_options`` of the C interface."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "adam_eps")),
        *((name, ctypes.c_double) for name in ("l1", "alpha", "max_update")),
        *((name, ctypes.c_void_p) for name in ("grad_scale", "found_inf")),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("first_index", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("l2", "maximize", "rounding", "eps_before")),
        *((name, ctypes.c_int32) for name in ("direction", "threads", "nesterov")),
        *((name, ctypes.c_int32) for name in ("iterations", "reserved")),
    ]


class Library:
    """Kernels of one type of device, ``cpu`` or ``cuda``; loaded at the first use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # Another build, such as one with sanitizers, may be named.
        named = os.environ.get(f"OPTIMZOO_{kind.upper()}_LIBRARY")
        self.path = Path(named or Path(__file__).with_name(f"_{kind}.so"))

    @functools.cached_property
    def _loaded(self) -> tuple[ctypes.CDLL | None, str]:
        if os.environ.get("OPTIMZOO_NATIVE", "1") == "0":
            return None, "OPTIMZOO_NATIVE=0 switches them off; unset it"
        if self.kind == "cuda" and torch.version.hip is not None:
            return None, "the native CUDA kernels are NVIDIA's alone, and this torch is ROCm's"
        if self.kind == "cuda" and self.path.exists():
            if not torch.cuda.is_available():
                return None, "torch finds no CUDA device"
            if torch.cuda.get_device_capability() < (8, 0):
                return None, "the CUDA kernels need a GPU of compute capability 8.0 or more"
        library, why = self._opened
        if library is not None and self.kind == "cuda":
            # A driver runs what a toolkit of its own major version has built, and of older ones.
            toolkit, driver = library.oz_cuda_toolkit(), library.oz_cuda_driver()
            if driver // 1000 < toolkit // 1000:
                return None, (
                    f"{self.path.name} was built with CUDA {_dotted(toolkit)}, the NVIDIA driver "
                    f"is for CUDA {_dotted(driver)}; update the driver, or build optimzoo on this "
                    "machine: pip install --no-binary optimzoo optimzoo"
                )
        return library, why

    @functools.cached_property
    def _opened(self) -> tuple[ctypes.CDLL | None, str]:
        """The library, whether or not the machine has its device; None with the reason."""
        if not self.path.exists():
            return None, self._why_not_built()
        if self.kind == "cpu":
            _share_openmp()
        try:
            library = ctypes.CDLL(str(self.path))
            abi = getattr(library, f"oz_{self.kind}_abi")()
            if self.kind == "cuda":
                library.oz_cuda_toolkit  # noqa: B018 - of the same ABI, and not in its first builds
        except (OSError, AttributeError) as error:
            return None, f"{self.path.name} cannot be loaded ({error}); install optimzoo again"
        if abi != _ABI:
            return None, f"{self.path.name} has ABI {abi}, not {_ABI}; install optimzoo again"
        return library, ""

    def _why_not_built(self) -> str:
        """Return the reason that csrc/build.py has written beside the library, and the way out."""
        tool = "g++ or clang++" if self.kind == "cpu" else "nvcc"
        report = self.path.with_suffix(".failure.txt")
        reason = f" ({report.read_text(encoding='utf-8').strip()})" if report.exists() else ""
        return f"{self.path.name} was not built{reason}; install {tool}, then optimzoo again"

    def available(self) -> bool:
        """Return whether the library was built and can be loaded here."""
        return self._loaded[0] is not None

    def why_not(self) -> str:
        """Return why the library is not available; empty if it is."""
        return self._loaded[1]

    def built_for(self) -> str:
        """Return the architectures and toolkit of the CUDA library; empty if it cannot be opened.

        It needs no GPU: this is how to see what a wheel holds.
        """
        unused = self.kind == "cpu" or torch.version.hip is not None
        library = None if unused else self._opened[0]
        if library is None:
            return ""
        architectures = (ctypes.c_int * library.oz_cuda_architectures(None, 0))()
        library.oz_cuda_architectures(architectures, len(architectures))
        names = ", ".join(f"sm_{number}" for number in architectures)
        return f"built for {names} with CUDA {_dotted(library.oz_cuda_toolkit())}"

    def variant(self) -> str:
        """Return the instruction set that the CPU library has chosen; empty for CUDA."""
        library = self._loaded[0]
        if library is None or self.kind == "cuda":
            return ""
        library.oz_cpu_isa.restype = ctypes.c_char_p
        return str(library.oz_cpu_isa().decode())

    def threaded(self) -> bool:
        """Return whether calls run in several threads; on the CPU that takes OpenMP at build."""
        library = self._loaded[0]
        return library is not None and (self.kind == "cuda" or bool(library.oz_cpu_threaded()))

    def scale_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: States,
        exp_avg_sqs: States,
        steps: States,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: Rate | list[Rate],
        momentum: float,
        weight_decay: float | list[float],
        l2: bool,
        eps: float,
        betas: tuple[float, float],
        adam_eps: float,
        maximize: bool,
        nesterov: bool = False,
        table: Table | None = None,
        **shared: Any,
    ) -> None:
        """Take SCALE's step (``oz_*_scale``); ``shared`` and ``table`` are :meth:`_call`'s."""
        extras: States = [] if table else self._scale_scratch(params, kinds, shapes)
        options = _Options(
            momentum=momentum,
            l2=l2,
            eps=eps,
            beta1=betas[0],
            beta2=betas[1],
            adam_eps=adam_eps,
            maximize=maximize,
            nesterov=nesterov,
        )
        columns = (params, grads, exp_avgs, exp_avg_sqs, [None] * len(params), steps, extras)
        shared.update(lr=lr, weight_decay=weight_decay, table=table)
        self._call("scale", columns, shapes, kinds, options, **shared)

    def adam_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: Tensors,
        exp_avg_sqs: Tensors,
        steps: States,
        *,
        lr: Rate | list[Rate],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float | list[float],
        maximize: bool,
        eps_before: bool,
        masks: States | None = None,
        l1: float = 0.0,
        alpha: float = 0.0,
        clips: States | None = None,
        direction: bool = False,
        max_update: float | None = None,
        **shared: Any,
    ) -> None:
        """Take a step of Adam, AdamW or AdamS, or write Adam's direction (``oz_*_adam``)."""
        none: States = [None] * len(params)
        options = _Options(
            beta1=betas[0],
            beta2=betas[1],
            adam_eps=eps,
            maximize=maximize,
            eps_before=eps_before,
            l1=l1,
            alpha=alpha,
            direction=direction,
            max_update=max_update or 0.0,
        )
        columns = (params, grads, exp_avgs, exp_avg_sqs, masks or none, steps, clips or none)
        shapes = [(1, p.numel()) for p in params]
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("adam", columns, shapes, [_ADAM] * len(params), options, **shared)

    def reduce_(
        self,
        grads: Tensors,
        outs: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Write sums of squares by row or column, or clipped, to ``outs`` (``oz_*_reduce``)."""
        none: States = [None] * len(grads)
        columns = (grads, grads, none, none, none, none, outs)
        self._call("reduce", columns, shapes, kinds, _Options(maximize=maximize), **shared)

    def apply_(
        self,
        params: Tensors,
        grads: Tensors,
        scales: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Step along the gradients scaled by ``scales`` (``oz_*_apply``)."""
        none: States = [None] * len(params)
        options = _Options(maximize=maximize)
        columns = (params, grads, none, none, none, none, scales)
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("apply", columns, shapes, kinds, options, **shared)

    def center_(
        self,
        outs: Tensors,
        grads: Tensors,
        shapes: Shapes,
        *,
        eps: float,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Write rows less their mean, over their deviation, to ``outs`` (``oz_*_center``)."""
        none: States = [None] * len(outs)
        options = _Options(eps=eps, maximize=maximize)
        columns = (outs, grads, none, none, none, none, none)
        self._call("center", columns, shapes, [_ROWS] * len(outs), options, **shared)

    def sinkhorn_(
        self,
        params: Tensors,
        grads: Tensors,
        kinds: Sequence[int],
        shapes: Shapes,
        *,
        lr: Rate | list[Rate],
        weight_decay: float,
        iterations: int,
        maximize: bool = False,
        **shared: Any,
    ) -> None:
        """Take SinkGD's step (``oz_cpu_sinkhorn``); on a GPU Triton has it.

        ``kinds`` says what an iteration normalises first, rows or columns.
        """
        none: States = [None] * len(params)
        options = _Options(iterations=iterations, maximize=maximize)
        columns = (params, grads, none, none, none, none, none)
        shared.update(lr=lr, weight_decay=weight_decay)
        self._call("sinkhorn", columns, shapes, kinds, options, **shared)

    def history_dot(self, history: Tensor, vector: Tensor) -> Tensor:
        """Return ``history @ vector``, both float32 or bfloat16, in float32; CPU only."""
        return self._history("dot", history, vector, history.shape[0])

    def history_combine(self, history: Tensor, weights: Tensor) -> Tensor:
        """Return ``weights @ history`` for a float32 or bfloat16 history, in float32; CPU only."""
        return self._history("combine", history, weights, history.shape[1])

    def _history(self, operation: str, history: Tensor, vector: Tensor, size: int) -> Tensor:
        out = torch.empty(size, dtype=torch.float32, device=history.device)
        if isinstance(history, FakeTensor):
            return out
        library = self._loaded[0]
        assert library is not None
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (history, vector, out)]
        sizes = [ctypes.c_int64(n) for n in history.shape]
        settings = map(ctypes.c_int32, (TYPES[history.dtype], torch.get_num_threads()))
        getattr(library, f"oz_cpu_history_{operation}")(*pointers, *sizes, *settings)
        return out

    def nm_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        """Return the packed N:M mask of a contiguous weight, ``[rows, ⌈cols / 8⌉]``; CPU only."""
        rows, cols = weight.shape[0], weight[:1].numel()
        mask = torch.empty(rows, -(-cols // 8), dtype=torch.uint8, device=weight.device)
        if isinstance(weight, FakeTensor):
            return mask
        library = self._loaded[0]
        assert library is not None
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, mask)]
        numbers = [TYPES[weight.dtype], n, m, torch.get_num_threads()]
        library.oz_cpu_nm_mask(
            *pointers, *(ctypes.c_int64(x) for x in (rows, cols)), *map(ctypes.c_int32, numbers)
        )
        return mask

    def _call(
        self,
        operation: str,
        columns: tuple[Sequence[Any], ...],
        shapes: Shapes,
        kinds: Sequence[int],
        options: _Options,
        *,
        lr: Rate | list[Rate] = 0.0,
        weight_decay: float | list[float] = 0.0,
        seed: int | None = None,
        step: int = 0,
        first_index: int = 0,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        table: Table | None = None,
    ) -> None:
        """Fill the table and call the kernel.

        Args:
            operation: the function's name without its prefix.
            columns: parameters, gradients, both moments, masks, steps, extras.
            shapes: rows and columns of each.
            kinds: ``enum oz_kind`` of each.
            options: options of this operation alone.
            lr: a number or a float32 tensor on the device, or a list with one for each tensor.
            weight_decay: a number, or a list with one for each tensor; negative: cautious.
            seed: seed of stochastic rounding; None rounds to nearest.
            step: step count of stochastic rounding.
            first_index: index of the first tensor in stochastic rounding.
            grad_scale: a float32 tensor; gradients are divided by it.
            found_inf: a float32 tensor; if it is not zero, nothing is written.
            table: table of an earlier call that differs in gradients, counts and rates alone.
        """
        params, grads = columns[:2]
        if not params or isinstance(params[0], FakeTensor):
            return  # shapes alone: kernels allocate nothing
        library, why = self._loaded
        if library is None:
            raise RuntimeError(f"no {self.kind} kernels: {why}")
        options.seed, options.step = seed or 0, step
        options.rounding, options.first_index = seed is not None, first_index
        options.grad_scale = None if grad_scale is None else grad_scale.data_ptr()
        options.found_inf = None if found_inf is None else found_inf.data_ptr()
        if table is None:
            table = Table(columns, shapes, kinds)
        else:
            table.set(grads, columns[5])
        table.set_rates(lr, weight_decay)
        function = getattr(library, f"oz_{self.kind}_{operation}")
        device = params[0].device
        arguments = (table.buffer, ctypes.c_int64(table.size), ctypes.byref(options))
        if self.kind == "cuda":
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                status = function(*arguments, stream)
        else:
            options.threads = torch.get_num_threads()
            status = function(*arguments, None)
        if status:
            raise RuntimeError(
                f"the {self.kind} kernel {operation} failed with CUDA error {status}"
            )
        if operation not in ("reduce",):
            torch.autograd.graph.increment_version(_written(columns))

    def scale_table(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avgs: States,
        exp_avg_sqs: States,
        steps: States,
        kinds: Sequence[int],
        shapes: Shapes,
    ) -> Table:
        """Return a table for calls of :meth:`scale_` on these tensors."""
        extras = self._scale_scratch(params, kinds, shapes)
        none = [None] * len(params)
        columns = (params, grads, exp_avgs, exp_avg_sqs, none, steps, extras)
        return Table(columns, shapes, kinds)

    def _scale_scratch(self, params: Tensors, kinds: Sequence[int], shapes: Shapes) -> States:
        """Allocate the scratch memory of SCALE's step: on a GPU, for the sums by column."""
        scratch: list[Tensor | None] = [None] * len(params)
        library = self._loaded[0]
        if self.kind == "cpu" or library is None:
            return scratch
        library.oz_cuda_scale_scratch.restype = ctypes.c_int64
        for i, (p, kind, shape) in enumerate(zip(params, kinds, shapes, strict=True)):
            if kind == _COLUMNS:
                size = library.oz_cuda_scale_scratch(*map(ctypes.c_int64, shape))
                scratch[i] = torch.empty(size // 4 + 1, dtype=torch.float32, device=p.device)
        return scratch


@functools.cache
def _share_openmp() -> None:
    """Make torch's OpenMP runtime the one in which a library's symbols are found.

    Two runtimes in a process keep two pools of threads on the same cores, one spinning while the
    other works. The library of a wheel links none, one that was built here links its compiler's:
    both take what is visible to all first. torch itself shows its runtime on x86-64, but not on
    aarch64, where the runtime also has a name of its own.
    """
    torch_folder = Path(torch.__file__).parent
    folders = (torch_folder / "lib", torch_folder.with_name("torch.libs"))
    paths = [path for folder in folders for path in folder.glob("libgomp*.so*")]
    for path in paths or [Path("libgomp.so.1")]:  # torch is not of a wheel: the system's
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _dotted(version: int) -> str:
    """Return CUDA's version number as people write it: 13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _written(columns: tuple[Sequence[Any], ...]) -> Iterable[Tensor]:
    """Return the parameters and moments, whose autograd version a call increments."""
    return [t for column in (columns[0], columns[2], columns[3]) for t in column if t is not None]


CPU = Library("cpu")
CUDA = Library("cuda")
