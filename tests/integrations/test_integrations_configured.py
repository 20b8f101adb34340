"""axolotl, torchtitan, LLaMA-Factory: the page's code by their own, where they are installed."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import optimzoo
from docs.hooks import pages
from optimzoo.integrations.transformers import trainer_optimizer

PAGE = (pages.ROOT / "docs/configured_trainers.md").read_text(encoding="utf-8")
WHY = "too many dependencies to install for one test; pip install --no-deps"


def code(trainer):
    """Return the Python of a trainer's section."""
    [section] = [text for text in PAGE.split("\n## ") if text.startswith(trainer)]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def test_a_factory_is_called_with_arguments_too():
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    from tiny_llama import tiny_llama

    model = tiny_llama()
    factory, options = trainer_optimizer("scale", lr=1e-3)
    for more in ((), (SimpleNamespace(learning_rate=9.0),)):
        optimizer = factory()(model, *more, **options)
        assert type(optimizer) is optimzoo.SCALE
        assert {g["role"]: g["lr"] for g in optimizer.param_groups}["hidden"] == 1e-3


def test_axolotl_s_trainer_takes_the_plugin_s_optimizer(tmp_path, monkeypatch):
    pytest.importorskip("axolotl", reason=f"{WHY} axolotl")
    from axolotl.core.trainers.mixins.optimizer import OptimizerMixin
    from axolotl.integrations.base import PluginManager
    from tiny_llama import rows, tiny_llama
    from transformers import Trainer, TrainingArguments

    class ItsTrainer(OptimizerMixin, Trainer):
        pass

    (tmp_path / "zoo.py").write_text(code("axolotl"))
    monkeypatch.syspath_prepend(tmp_path)
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "max_steps": 1}
    args = TrainingArguments(str(tmp_path), learning_rate=2.5e-4, **options)
    for name in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups"):
        setattr(args, name, None)  # of its own arguments
    args.optim_args = "vector_lr=1e-2"
    trainer = ItsTrainer(tiny_llama(), args, train_dataset=rows(8))
    manager = PluginManager.get_instance()
    manager.register("zoo.Zoo")
    manager.post_trainer_create(SimpleNamespace(), trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is optimzoo.SCALE
    found = {g["role"]: g["initial_lr"] for g in optimizer.param_groups}
    assert found == {"hidden": 2.5e-4, "embedding": 4e-3, "head": 5e-4, "vector": 1e-2}
    sys.modules.pop("zoo", None)


def test_torchtitan_s_container_steps_by_role():
    pytest.importorskip("torchtitan", reason=f"{WHY} torchtitan tyro docstring_parser spmd_types")
    scope = {"optimzoo": optimzoo, "__name__": __name__}
    exec(code("torchtitan"), scope)
    model = nn.Module()
    model.tok_embeddings, model.lm_head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
    model.layer, model.norm = nn.Linear(8, 8, bias=False), nn.RMSNorm(8)
    container = scope["config"].build(model_parts=[model])
    [optimizer] = container
    assert type(optimizer) is optimzoo.SCALE
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hidden = model.norm(model.layer(model.tok_embeddings(torch.arange(32))))
    model.lm_head(hidden).square().sum().backward()
    container.step()
    assert "exp_avg" in optimizer.state[model.lm_head.weight]
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for name, dim, lr in (("tok_embeddings", 0, 4e-3), ("lm_head", 1, 5e-4), ("layer", 1, 2.5e-4)):
        rms = moved[f"{name}.weight"].square().mean(dim).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, lr), rtol=1e-3, atol=0)


def test_llama_factory_s_trainers_ask_the_launcher_s_function(monkeypatch):
    pytest.importorskip("llamafactory", reason=f"{WHY} llamafactory (and the trl of its time)")
    from llamafactory.train.pt import trainer as pt
    from llamafactory.train.sft import trainer as sft
    from tiny_llama import tiny_llama

    for module in (pt, sft):
        monkeypatch.setattr(module, "create_custom_optimizer", None)
    exec(code("LLaMA-Factory"), {"optimzoo": optimzoo})
    for module, cls in ((pt, "CustomTrainer"), (sft, "CustomSeq2SeqTrainer")):
        args = SimpleNamespace(learning_rate=1e-3)
        its = SimpleNamespace(optimizer=None, model=tiny_llama(), args=args, finetuning_args=None)
        made = module.create_custom_optimizer(its.model, its.args, its.finetuning_args)
        assert type(made) is optimzoo.SCALE
        assert "create_custom_optimizer" in getattr(module, cls).create_optimizer.__code__.co_names
