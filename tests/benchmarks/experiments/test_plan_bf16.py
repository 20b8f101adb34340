"""A plan that takes its learning rates from another: `nano-bf16` from `nano`."""

import pytest

from benchmarks.experiments.plan import Plan, settings


@pytest.mark.parametrize("method", ["scale", "adamw"])
def test_every_precision_trains_at_the_same_tuned_rates(method):
    nano, plan = Plan("nano"), Plan("nano-bf16")
    wanted = nano.chosen(method, "tuned", 2).config
    kinds = {"fp32": "fp32", "nearest": "bf16", "stochastic": "bf16"}
    for kind, precision in kinds.items():
        config = plan.chosen(f"{method}_{kind}", "tuned", 2).config
        assert config.optimizer == method and config.precision == precision
        rates = [settings({"config": vars(c)}) for c in (config, wanted)]
        assert rates[0] == rates[1]
        assert (config.steps, config.seed) == (wanted.steps, 2)
        rounding = {"rounding": "stochastic"} if kind == "stochastic" else {}
        assert config.hyper == {**wanted.hyper, **rounding}


def test_it_is_tuned_elsewhere():
    with pytest.raises(ValueError, match="plan nano-bf16 is tuned by plan nano; run compare"):
        Plan("nano-bf16").tuning_runs("scale_fp32", "tuned", [])
