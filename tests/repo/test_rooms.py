"""Imports point down: each room of benchmarks/ and each part of optimzoo/ uses those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimzoo

ROOT = Path(optimzoo.__file__).resolve().parents[1]
# From the bottom up; what stands in one line does not import each other.
ORDER = {
    "benchmarks": [
        ["common"],
        ["data"],
        ["training"],
        ["experiments"],
        ["papers", "microbench"],
        ["report"],
        ["__main__"],
    ],
    "optimzoo": [
        ["options"],
        [
            "_version",
            "flattened",
            "lr_range_test",
            "distributed",
            "kernels",
            "models",
            "stacks",
        ],
        ["lowbit"],
        ["roles", "subspace"],
        ["sparsity", "lowrank", "update_statistics"],
        ["core"],
        ["optimizers"],
        ["gradient_stabilizer"],
        ["gradient_release", "registry", "doctor", "state_transfer"],
        ["tuned_rates"],
        ["memory", "integrations", "audit"],
        ["cli"],
        ["__main__", "__init__"],
    ],
}
# Modules whose names are public although no package lists them.
PUBLIC = (
    "optimzoo.roles",
    "optimzoo.models.llama",
    "optimzoo.options",
    "optimzoo.tuned_rates",
)
MAX_LINES = 300


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The names that a file imports, each with its module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def part(path: Path, package: str) -> str:
    """The part of a package that a file belongs to."""
    return path.relative_to(ROOT / package).parts[0].removesuffix(".py")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package):
    heights = {name: i for i, names in enumerate(ORDER[package]) for name in names}
    assert {part(path, package) for path in files(package)} - {"__init__"} <= heights.keys()
    wrong = []
    for path in files(package):
        own = part(path, package)
        for module, name in imports(path):
            first, *more = module.split(".")
            if first != package or own == "__init__":
                continue
            # `from optimzoo import roles` imports a part, `from optimzoo import release` the whole.
            used = more[0] if more else name if name in heights else "__init__"
            if used == "__init__" and name == "__version__":
                continue
            if used != own and heights.get(used, 99) >= heights[own]:
                wrong.append(f"{path.relative_to(ROOT)}: {module} {name}")
    assert not wrong


def test_benchmarks_uses_public_names_of_optimzoo_only():
    wrong = []
    for path in files("benchmarks"):
        for module, name in imports(path):
            if module.split(".")[0] != "optimzoo" or module in PUBLIC or not name:
                continue
            package = ROOT.joinpath(*module.split("."), "__init__.py")
            listed = []
            if package.exists():
                tree = ast.parse(package.read_text(encoding="utf-8"))
                for node in tree.body:
                    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                        listed = ast.literal_eval(node.value)
            if name not in listed:
                wrong.append(f"{path.relative_to(ROOT)}: {module} {name}")
    assert not wrong


def test_benchmarks_has_rooms_and_no_long_file():
    root = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert root == {"__init__.py", "__main__.py"}
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in files("benchmarks")}
    assert not {str(p): n for p, n in lines.items() if n > MAX_LINES}
