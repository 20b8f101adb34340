"""Adapter for Hugging Face's ``Trainer``, with groups built from the model that it trains."""

import ast
import logging
from typing import Any, Protocol

from torch import nn
from torch.optim.optimizer import Optimizer

from optimzoo.registry import create_optimizer, get_info, hyperparameters
from optimzoo.roles import Overrides, param_groups

logger = logging.getLogger(__name__)


class Arguments(Protocol):
    """What is read of ``TrainingArguments``."""

    learning_rate: float
    weight_decay: float
    optim_args: str | None


class _Factory:
    """Factory that ``Trainer`` takes for an optimizer class and calls with its model."""

    def __init__(self, *groups: Any, **options: Any) -> None:
        if groups or options:  # an older Trainer, which knows classes alone, passes its own groups
            raise TypeError(
                "this transformers has no optimizer factories; upgrade it, or pass "
                "optimizers=(optimzoo.create_optimizer(...), None) to the Trainer"
            )

    # axolotl's Trainer passes its arguments too; `trainer_optimizer` has read what is read of them.
    def __call__(
        self, model: nn.Module, *_: Any, name: str, overrides: Overrides, **options: Any
    ) -> Optimizer:
        return create_optimizer(name, param_groups(model, overrides), **options)


def trainer_optimizer(
    name: str,
    *,
    args: Arguments | None = None,
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
        args: the ``TrainingArguments``, which do not reach a factory by themselves. `learning_rate`
            is that of the hidden weights, `weight_decay` the method's, where it has one, and
            `optim_args` has further options, as in ``"vector_lr=1e-2, betas=(0.9, 0.95)"``; what is
            given here by name comes first. Without `args` none of them is read. The schedule of the
            ``Trainer`` is followed in any case.
        lr: learning rate of the hidden weights; default: the method's own, which is then logged.
        overrides: as in :func:`optimzoo.param_groups`.
        **hyper: the method's other hyperparameters, `other_lr` and the like among them;
            `weight_decay` leaves out norms and biases, as ``Trainer``'s own groups do.

    Raises:
        ValueError: an unknown name or hyperparameter, or `optim_args` that cannot be read.

    Examples:
        >>> pair = trainer_optimizer("scale", args=args, vector_lr=1e-2)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair)
    """
    info = get_info(name)
    accepted = hyperparameters(info)
    if args is not None:
        hyper = {**_parsed(args.optim_args), **hyper}
        lr = hyper.pop("lr", args.learning_rate) if lr is None else lr
        if args.weight_decay and "weight_decay" in accepted:
            hyper.setdefault("weight_decay", args.weight_decay)
    elif lr is None:
        logger.warning(
            "trainer_optimizer(%r): the method's own learning rate; give lr=, or args= for the "
            "learning_rate of TrainingArguments",
            info.name,
        )
    unknown = [key for key in hyper if key not in accepted]
    if unknown:  # now, and not after the data has been prepared
        raise ValueError(
            f"{info.name} has no hyperparameter {unknown[0]!r}; it takes {', '.join(accepted)}"
        )
    return _Factory, {"name": name, "lr": lr, "overrides": overrides, **hyper}


def _parsed(text: str | None) -> dict[str, Any]:
    """Return the options in a text like the keywords of a call; a bare word is a string.

    Raises:
        ValueError: the text is something else.
    """
    try:
        call = ast.parse(f"dict({text or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("values without names")
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"optim_args {text!r} cannot be read; write options as in "
            "'vector_lr=1e-2, betas=(0.9, 0.95)'"
        ) from None


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
