"""Public language models by the names that people type.

The table has what a ``config.json`` says of shapes and of the memory that a step takes; rotary
frequencies and the like, on which no byte depends, are left out. It is for planning, not for
loading weights.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PublicModel:
    """Public model: where it is from, its published size, and the fields of its ``config.json``.

    Attributes:
        repository: `organisation/name` on the Hugging Face Hub.
        released: year and month of its release.
        parameters: published number of parameters, a tied head counted once.
        also: other names, of variants with the same shapes.
        config: fields of its ``config.json``, `model_type` among them.
    """

    repository: str
    released: str
    parameters: int
    also: tuple[str, ...]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Return its shortest name, without the organisation."""
        return min(self.names, key=len)

    @property
    def names(self) -> tuple[str, ...]:
        """Return all its names, without the organisation."""
        return (self.repository.rpartition("/")[2], *self.also)


@cache
def public_models() -> tuple[PublicModel, ...]:
    """Return the public models, in the table's order."""
    text = resources.files("optimzoo.models").joinpath("public.json").read_text(encoding="utf-8")
    return tuple(
        PublicModel(repository, **{**fields, "also": tuple(fields["also"])})
        for repository, fields in json.loads(text)["models"].items()
    )


def find_public(name: str) -> PublicModel | None:
    """Return the public model of a name, with or without its organisation, in any case."""
    return _by_name().get(name.lower())


@cache
def _by_name() -> dict[str, PublicModel]:
    names: dict[str, PublicModel] = {}
    for model in public_models():
        organisation = model.repository.partition("/")[0]
        for name in model.names:
            names |= {name.lower(): model, f"{organisation}/{name}".lower(): model}
    return names
