"""What a test may need of the machine, and the one reason why it is skipped without it."""

import pytest

from optimzoo.kernels import native

WITHOUT_CPU_KERNELS = f"needs the CPU kernels: {native.CPU.why_not()}"
needs_cpu_kernels = pytest.mark.skipif(not native.CPU.available(), reason=WITHOUT_CPU_KERNELS)
