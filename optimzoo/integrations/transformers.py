"""Adapter for Hugging Face's ``Trainer``, with groups built from the model that it trains."""

from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from optimzoo.registry import create_optimizer, get_info, hyperparameters
from optimzoo.roles import Overrides, param_groups


class _Factory:
    """Factory that ``Trainer`` takes for an optimizer class and calls with its model."""

    def __init__(self, *groups: Any, **options: Any) -> None:
        if groups or options:  # an older Trainer, which knows classes alone, passes its own groups
            raise TypeError(
                "this transformers has no optimizer factories; upgrade it, or pass "
                "optimizers=(optimzoo.create_optimizer(...), None) to the Trainer"
            )

    def __call__(
        self, model: nn.Module, *, name: str, overrides: Overrides, **options: Any
    ) -> Optimizer:
        return create_optimizer(name, param_groups(model, overrides), **options)


def trainer_optimizer(
    name: str,
    *,
    lr: float | None = None,
    overrides: Overrides = (),
    **hyper: Any,
) -> tuple[type[_Factory], dict[str, Any]]:
    """Return the pair for ``Trainer(optimizer_cls_and_kwargs=...)``, with groups by role.

    A class alone would get the two groups that ``Trainer`` makes (with and without weight decay),
    and could not know the embedding or the head. The optimizer is made when training starts, from
    the model as it is then: `model_init` and sharded models work.

    Args:
        name: one of :func:`optimzoo.list_optimizers`.
        lr: learning rate of the hidden weights; ``TrainingArguments``' `learning_rate`, `optim`,
            `weight_decay` and `adam_*` are not read. Its schedule is followed.
        overrides: as in :func:`optimzoo.param_groups`.
        **hyper: the method's other hyperparameters, `other_lr` and the like among them;
            `weight_decay` leaves out norms and biases, as ``Trainer``'s own groups do.

    Raises:
        ValueError: an unknown name or hyperparameter.

    Example:
        >>> pair = trainer_optimizer("scale", lr=1e-3, vector_lr=1e-2)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair)
    """
    info = get_info(name)
    accepted = hyperparameters(info)
    unknown = [key for key in hyper if key not in accepted]
    if unknown:  # now, and not after the data has been prepared
        raise ValueError(
            f"{info.name} has no hyperparameter {unknown[0]!r}; it takes {', '.join(accepted)}"
        )
    return _Factory, {"name": name, "lr": lr, "overrides": overrides, **hyper}
