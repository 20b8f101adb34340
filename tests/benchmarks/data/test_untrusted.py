"""Nothing in the package runs code that comes from a file."""

import ast

import pytest
from data_helpers import ROOT

SOURCES = sorted(
    path for folder in ("optimzoo", "benchmarks", "csrc") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "unsafe_load", "full_load", "broadcast_object_list", "all_gather_object"}
CALLS |= {"gather_object", "scatter_object_list", "recv_object_list", "load_all", "read_pickle"}


def found(source: str) -> list[str]:
    """What a source has of what can run code out of data."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            bad += [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            bad += _calls(node)
    return bad


def _calls(node: ast.Call) -> list[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    method = isinstance(node.func, ast.Attribute)
    owner = ast.unparse(node.func.value) if method else ""
    options = {k.arg: ast.unparse(k.value) for k in node.keywords}
    # A method called eval is a module's switch to evaluation.
    if name in CALLS and not (method and name in ("eval", "exec")):
        return [name]
    if name == "load" and owner == "torch" and options.get("weights_only") != "True":
        return ["torch.load"]
    if name == "load" and owner == "yaml":
        return ["yaml.load"]
    return ["allow_pickle"] if options.get("allow_pickle", "False") != "False" else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_data(path):
    assert found(path.read_text(encoding="utf-8")) == []


BAD = [
    "import pickle",
    "from pickle import loads",
    "eval('1')",
    "exec(text)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "np.load(path, allow_pickle=True)",
    "dist.broadcast_object_list(things)",
    "yaml.load(text)",
]


@pytest.mark.parametrize("source", BAD)
def test_the_search_finds_it(source):
    assert len(found(source)) == 1


def test_the_search_finds_files():
    assert len(SOURCES) > 50
    assert found("model.eval()\ntorch.load(path, weights_only=True)\nnp.load(path)") == []
