"""Shared libraries of the native kernels: loading, and what to say where that is impossible."""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import torch

ABI = 10


class SharedLibrary:
    """Kernels' library for one type of device, ``cpu`` or ``cuda``; loaded at the first use."""

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
        if abi != ABI:
            return None, f"{self.path.name} has ABI {abi}, not {ABI}; install optimzoo again"
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
