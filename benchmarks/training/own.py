"""Optimizers of one's own: a class that is named by its module or its file."""

import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer

from optimzoo.options import brief
from optimzoo.roles import ROLES


def is_own(name: str) -> bool:
    """Return whether an optimizer's name is that of a class, not one of optimzoo's registry."""
    return ":" in name


def load_class(where: str) -> type[Optimizer]:
    """Return the class that ``package.module:Class`` or ``FILE.py:Class`` names.

    Raises:
        ValueError: it cannot be imported, or is no subclass of `torch.optim.Optimizer`.
    """
    source, _, name = where.rpartition(":")
    try:
        if not (source and name):
            raise ImportError("a module and a class, with a colon between them, are needed")
        loaded = getattr(_run(source), name) if _is_file(source) else pkgutil.resolve_name(where)
    except Exception as error:  # the module is the user's: it may raise any
        raise ValueError(
            f"optimizer {where} cannot be imported ({brief(error)}); "
            "give package.module:Class or FILE.py:Class"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Optimizer)):
        description = loaded.__name__ if isinstance(loaded, type) else f"a {type(loaded).__name__}"
        raise ValueError(
            f"optimizer {where} is {description}, not a subclass of torch.optim.Optimizer"
        )
    return loaded


def source_sha256(where: str) -> str:
    """Return the sha256 of the file that defines a class.

    Raises:
        ValueError: it is in no file, as a class that was typed into an interpreter.
    """
    source = where.rpartition(":")[0]
    try:
        path = source if _is_file(source) else inspect.getfile(load_class(where))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, TypeError) as error:
        raise ValueError(
            f"optimizer {where} is in no file ({brief(error)}); save it as FILE.py"
        ) from error


def create_own(where: str, groups: list[dict[str, Any]], *, lr: float, **hyper: Any) -> Optimizer:
    """Create an optimizer of one's own on the groups of `optimzoo.param_groups`.

    Each group has its learning rate: its own, else that of its role (`embedding_lr`, `head_lr`,
    `vector_lr`), else ``lr``. The class gets ``lr`` and the other options as keywords.

    Raises:
        ValueError: the class cannot be loaded, or refuses the groups or the options.
    """
    make: Any = load_class(where)
    rates = {role: hyper.pop(f"{role}_lr", lr) for role in ROLES if role != "hidden"}
    groups = [{"lr": rates.get(group["role"], lr), **group} for group in groups]
    try:
        optimizer: Optimizer = make(groups, lr=lr, **hyper)
    except Exception as error:  # the constructor is the user's: it may raise any
        raise ValueError(
            f"optimizer {where} refuses lr {lr:g} and hyper {hyper}: {brief(error)}"
        ) from error
    return optimizer


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _run(path: str) -> Any:
    """Return the module of a file, executed anew: the file may have changed."""
    name = f"_own_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module
