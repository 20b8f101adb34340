"""Hugging Face's Trainer: the class it trains with, the rule, saving and resuming, fine-tuning."""

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate; pip install '.[test]'")
from tiny_llama import (
    assert_same,
    assert_stepped_by_scale,
    batch,
    plain_loop,
    rows,
    tiny_llama,
    weights,
)
from transformers import Trainer, TrainingArguments

import optimzoo
from optimzoo.integrations.transformers import trainer_optimizer

pytestmark = pytest.mark.thorough
HYPER = {"lr": 3e-3, "vector_lr": 1e-2}


def arguments(path, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0}
    fixed = {"per_device_train_batch_size": 2, "save_strategy": "no", "max_grad_norm": 0.0}
    schedule = {"lr_scheduler_type": "constant", "max_steps": 4}
    return TrainingArguments(str(path), **{**quiet, **fixed, **schedule, **options})


def optimizer_of(trainer):
    return trainer.optimizer.optimizer  # accelerate's wrapper


def trained(path, model, data=None, collate=batch, resume=None, options=(), **how):
    trainer = Trainer(
        model,
        arguments(path, **dict(options)),
        train_dataset=rows(16) if data is None else data,
        data_collator=collate,
        **how,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", ["scale", "natural_galore", "muon", "stable_spam"])
def test_the_pair_trains_with_the_class_and_as_a_plain_loop_does(name, tmp_path):
    hyper = {"scale": HYPER, "natural_galore": {"lr": 3e-3, "rank": 4, "history": 3}}
    hyper = hyper.get(name, {"lr": 3e-3})
    seen = []

    def collate(examples):
        seen.append(batch(examples))
        return seen[-1]

    pair = trainer_optimizer(name, **hyper)
    trainer = trained(tmp_path, tiny_llama(), collate=collate, optimizer_cls_and_kwargs=pair)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is optimzoo.get_info(name).make
    assert [g["role"] for g in optimizer.param_groups] == ["hidden", "embedding", "head", "vector"]
    plain = tiny_llama()
    expected = plain_loop(
        plain, optimzoo.create_optimizer(name, plain, **hyper), [dict(b) for b in seen[:4]]
    )
    assert_same(weights(trainer.model), expected)


@pytest.mark.parametrize("way", ["pair", "optimizers"])
def test_one_step_moves_every_column_by_lr(way, tmp_path):
    model = tiny_llama()
    before = weights(model)
    if way == "pair":
        how = {"optimizer_cls_and_kwargs": trainer_optimizer("scale", **HYPER)}
    else:
        optimizer = optimzoo.SCALE(optimzoo.param_groups(model), **HYPER)
        how = {"optimizers": (optimizer, None)}
    trainer = trained(tmp_path, model, options={"max_steps": 1}, **how)
    assert type(optimizer_of(trainer)) is optimzoo.SCALE
    assert_stepped_by_scale(before, model, HYPER["lr"])


def test_the_schedule_of_the_arguments_scales_every_group(tmp_path):
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    pair = trainer_optimizer("scale", **HYPER)
    trainer = trained(tmp_path, tiny_llama(), options=options, optimizer_cls_and_kwargs=pair)
    groups = optimizer_of(trainer).param_groups
    assert [g["initial_lr"] for g in groups] == [3e-3, 3e-3, 3e-3, 1e-2]
    assert [g["lr"] for g in groups] == [0.0] * 4


@pytest.mark.parametrize("name", ["scale", "galore"])
def test_saved_and_resumed_is_the_run_that_was_not_interrupted(name, tmp_path):
    hyper = HYPER if name == "scale" else {"lr": 3e-3, "rank": 4, "update_proj_gap": 3}
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    options["lr_scheduler_type"] = "cosine"

    def run(resume=None):
        pair = trainer_optimizer(name, **hyper)
        how = {"resume": resume, "options": options, "optimizer_cls_and_kwargs": pair}
        return trained(tmp_path, tiny_llama(), **how)

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert type(optimizer_of(resumed)) is optimzoo.get_info(name).make
    for name_, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name_)), name_
    ours, theirs = (optimizer_of(t).state_dict() for t in (whole, resumed))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        for key, value in state.items():
            assert torch.equal(value, theirs["state"][index][key]), key


def test_a_model_made_by_model_init(tmp_path):
    pair = trainer_optimizer("scale", **HYPER, overrides={r"mlp\.down": "vector"})
    how = {"optimizer_cls_and_kwargs": pair}
    trainer = trained(tmp_path, None, model_init=lambda: tiny_llama(), **how)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is optimzoo.SCALE
    [forced] = [g for g in optimizer.param_groups if any("down" in n for n in g["param_names"])]
    assert forced["role"] == "vector"
    assert trainer.model.model.layers[0].mlp.down_proj.weight in optimizer.state


def test_the_arguments_are_heeded_where_they_are_given(tmp_path):
    text = "vector_lr=2e-3, other_betas=(0.8, 0.9), rounding=stochastic"
    options = {"learning_rate": 3e-4, "weight_decay": 0.1, "optim_args": text}
    args = arguments(tmp_path, **options)
    pair = trainer_optimizer("galore", args=args, rank=4)
    how = {"optimizer_cls_and_kwargs": pair, "options": {**options, "max_steps": 1}}
    groups = optimizer_of(trained(tmp_path, tiny_llama(), **how)).param_groups
    rates = {g["role"]: g["initial_lr"] for g in groups}
    assert rates == {"hidden": 3e-4, "embedding": 3e-4, "head": 3e-4, "vector": 2e-3}
    assert {g["role"]: g["weight_decay"] for g in groups} == {
        **dict.fromkeys(("hidden", "embedding", "head"), 0.1),
        "vector": 0.0,
    }
    assert {tuple(g["betas"]) for g in groups if g["role"] != "hidden"} == {(0.8, 0.9)}
    assert {(g["rank"], g["rounding"]) for g in groups} == {(4, "stochastic")}
    given = {"lr": 1e-2, "weight_decay": 0.0, "other_betas": (0.9, 0.95)}
    named = trainer_optimizer("scale", args=args, **given)[1]
    assert {key: named[key] for key in given} == given and named["vector_lr"] == 2e-3
    args.optim_args = "lr=5e-4"
    assert trainer_optimizer("scale", args=args)[1]["lr"] == 5e-4
    assert "weight_decay" not in trainer_optimizer("adafactor", args=arguments(tmp_path))[1]


def test_the_methods_own_rate_is_told(caplog):
    assert trainer_optimizer("scale")[1]["lr"] is None
    assert "the method's own learning rate; give lr=, or args=" in caplog.text
    caplog.clear()
    trainer_optimizer("scale", lr=1e-3)
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["lr", "1e-3", "lr=1e-3; x=1", "lr=f()", "**{'lr': 1}"])
def test_optim_args_that_cannot_be_read_are_named(text, tmp_path):
    with pytest.raises(ValueError, match="cannot be read; write options as in") as error:
        trainer_optimizer("scale", args=arguments(tmp_path, optim_args=text))
    assert repr(text) in str(error.value)


def test_wrong_arguments_are_refused_before_training():
    with pytest.raises(ValueError, match="unknown optimizer 'scal'; did you mean scale"):
        trainer_optimizer("scal")
    with pytest.raises(ValueError, match="scale has no hyperparameter 'rank'; it takes lr, mom"):
        trainer_optimizer("scale", rank=4)
    make, options = trainer_optimizer("scale", lr=1e-3)
    with pytest.raises(TypeError, match="has no optimizer factories; upgrade it"):
        make([{"params": []}], **options)


def completion_batch(examples):
    """As TRL collates prompt and completion: the loss is that of the completion alone."""
    length = max(len(e["prompt"]) + len(e["completion"]) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, example in enumerate(examples):
        start, end = len(example["prompt"]), len(example["prompt"]) + len(example["completion"])
        ids[i, :end] = torch.tensor(example["prompt"] + example["completion"])
        labels[i, start:end], mask[i, :end] = ids[i, start:end], 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_fine_tuning_on_completions_alone(tmp_path):
    data = [
        {"prompt": [1, 2 + i % 5, *range(10, 10 + i % 3)], "completion": [7, 7 + i % 5, 3]}
        for i in range(32)
    ]
    model = tiny_llama()
    inputs = completion_batch(data[:4])
    with torch.no_grad():
        out = model(**inputs)
    logp = out.logits[:, :-1].log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    picked = logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0][targets != -100]
    assert len(picked) == 4 * 3
    torch.testing.assert_close(out.loss, -picked.mean())
    options = {"max_steps": 40, "per_device_train_batch_size": 8, "remove_unused_columns": False}
    trainer = trained(
        tmp_path,
        model,
        data,
        completion_batch,
        options=options,
        optimizer_cls_and_kwargs=trainer_optimizer("scale", lr=2e-3, vector_lr=1e-2),
    )
    assert type(optimizer_of(trainer)) is optimzoo.SCALE
    with torch.no_grad():
        after = trainer.model(**inputs).loss
    assert after < out.loss / 4
    before = weights(model)
    batches = [completion_batch(data[:8])]
    plain_loop(model, optimizer_of(trainer), batches)
    moved = model.lm_head.weight.detach() - before["lm_head.weight"]
    torch.testing.assert_close(moved.square().mean(-1).sqrt(), torch.full((61,), 2e-3))
