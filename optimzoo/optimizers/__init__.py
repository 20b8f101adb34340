"""The optimizers, one file a method; importing the package registers all of them."""

import importlib
import pkgutil

NAMES = [module.name for module in pkgutil.iter_modules(__path__)]
METHODS = [importlib.import_module(f"{__name__}.{name}") for name in NAMES]
