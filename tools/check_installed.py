"""Check an installed optimzoo as a user has it: outside of a checkout, with no compiler on PATH.

    python check_installed.py [--kernels | --eager] [--cuda]

It prints a line for each thing that it finds right, and exits with the first that is not.
``tools/test_wheels.py`` runs it in environments that it makes.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

IMPORT_LIMIT = 0.2  # seconds of CPU that `import optimzoo` may add to `import torch`
STARTS = 7
IMPORT = """
import time, torch
begin = time.process_time()
import optimzoo
print(time.process_time() - begin)
"""
COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc", "nvcc")
METHODS = ("scale", "sinkgd", "rmnp", "stable_spam", "galore")


def need(condition: bool, fault: str) -> None:
    """Exit with a line unless the condition holds."""
    if not condition:
        sys.exit(f"error: {fault}")


def check_place() -> None:
    """Check that this is an installed package and that there is no compiler."""
    import optimzoo

    place = Path(optimzoo.__file__)
    need("site-packages" in place.parts, f"optimzoo is {place}, which is not installed")
    found = [name for name in COMPILERS if shutil.which(name)]
    need(not found, f"{', '.join(found)} on PATH: nothing would be shown")
    print("no compiler on PATH")


def check_doctor(kernels: bool, cuda: bool) -> None:
    """Check what ``optimzoo doctor`` says of the libraries, and that it is content."""
    result = subprocess.run(["optimzoo", "doctor"], capture_output=True, text=True)
    need(result.returncode == 0, f"optimzoo doctor: {result.stdout}{result.stderr}")
    cpu = next(line for line in result.stdout.splitlines() if line.startswith("cpu, native:"))
    if kernels:
        need("none" not in cpu and "one thread" not in cpu, cpu)
        need(result.stdout.count("  ok\n") >= 3, f"optimzoo doctor: {result.stdout}")
    else:
        need("every step is eager" in cpu and "install g++ or clang++" in cpu, cpu)
    if cuda:
        built = "built for sm_80, sm_90, sm_100 "
        need(built in result.stdout, f"optimzoo doctor names no library {built}: {result.stdout}")
    print(result.stdout.strip())


def check_steps() -> None:
    """Check that steps by kernels, which ``fused=True`` insists on, are those of the eager path."""
    import torch

    import optimzoo

    def trained(method: str, fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 32))
        inputs = torch.randn(8, 48)
        optimizer = optimzoo.create_optimizer(method, model, lr=1e-2, fused=fused)
        for _ in range(3):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for method in METHODS:
        pairs = zip(trained(method, True), trained(method, False), strict=True)
        error = max(float((ours - eager).abs().max()) for ours, eager in pairs)
        need(error < 1e-5, f"{method}: a step by kernels is {error:.1e} off the eager one")
        print(f"{method}: kernels and eager path differ by {error:.1e}")


def check_openmp() -> None:
    """Check that a process has one OpenMP runtime, torch's, after a step in threads."""
    import torch

    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    place = Path(torch.__file__).parent.parent
    need(len(names) == 1, f"OpenMP runtimes in the process: {sorted(names)}")
    need(place in Path(names.pop()).parents, "the OpenMP runtime is not torch's")
    print("one OpenMP runtime, torch's")


def check_import() -> None:
    """Check what importing optimzoo adds to importing torch, in CPU time: the median of starts."""
    added = []
    for _ in range(1 + STARTS):  # the first writes bytecode
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
        need(run.returncode == 0, f"import optimzoo: {run.stderr}")
        added.append(float(run.stdout))
    median = statistics.median(added[1:])
    need(median <= IMPORT_LIMIT, f"import optimzoo adds {median:.2f} s, over {IMPORT_LIMIT}")
    print(f"import optimzoo adds {median:.3f} s of CPU to import torch")


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description="check an installed optimzoo")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--kernels", action="store_true", help="the CPU kernels must be there")
    kinds.add_argument("--eager", action="store_true", help="they must not be there")
    parser.add_argument("--cuda", action="store_true", help="the CUDA library must be there")
    args = parser.parse_args()
    check_place()
    check_doctor(args.kernels, args.cuda)
    if args.kernels:
        check_steps()
        check_openmp()
    check_import()
    return 0


if __name__ == "__main__":
    sys.exit(main())
