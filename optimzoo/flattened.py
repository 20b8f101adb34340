"""Checks that refuse weights flattened, emptied or partitioned by FSDP1 or DeepSpeed."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

_WAY_OUT = "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
_FSDP1 = "FSDP1 (FullyShardedDataParallel)"


def flattened_by(param: Any) -> str | None:
    """Return the name of the library that has flattened or partitioned ``param``, or None."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        return _FSDP1
    if hasattr(param, "ds_id") or hasattr(param, "ds_shape"):
        return "DeepSpeed (zero.Init)"
    return None


def refuse_flattened(params: Iterable[Any], names: Sequence[str] = ()) -> None:
    """Raise a ValueError for the first parameter that is flattened or partitioned."""
    for i, param in enumerate(params):
        owner = flattened_by(param)
        if owner is not None:
            label = names[i] if i < len(names) else f"parameter {i}"
            raise ValueError(
                f"{label} {tuple(param.shape)} belongs to {owner}, which flattens weights: no rule "
                f"sees a matrix; {_WAY_OUT}"
            )


def refuse_flat_matrices(groups: Iterable[dict[str, Any]], roles: Sequence[str]) -> None:
    """Raise a ValueError for a parameter that was flattened after its group was built."""
    for group in groups:
        refuse_flattened(group["params"], group.get("param_names", ()))
        if group.get("role") not in roles:
            continue
        for param in group["params"]:
            if param.ndim < 2:
                raise ValueError(
                    f"a parameter {tuple(param.shape)} of the role {group['role']!r} has been "
                    "flattened since the optimizer was built, as DeepSpeed's ZeRO does; "
                    f"{_WAY_OUT}"
                )


def refuse_flattened_modules(model: nn.Module) -> None:
    """Raise a ValueError if FSDP1 wraps ``model`` or a module in it."""
    for path, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise ValueError(
                f"{path or 'the model'} is wrapped by {_FSDP1}, which flattens weights: no rule "
                f"sees a matrix; {_WAY_OUT}"
            )


def refuse_flat_weight(name: str, param: Tensor, module: nn.Module) -> None:
    """Raise a ValueError for a trainable weight of a layer that has lost its dimensions."""
    if param.requires_grad and param.ndim < 2:
        raise ValueError(
            f"{name} {tuple(param.shape)} is the weight of a {type(module).__name__} and has been "
            f"flattened or emptied; {_WAY_OUT}"
        )
