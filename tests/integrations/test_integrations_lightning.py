"""Lightning: `configure_optimizers`, gradient clipping, schedulers, checkpoints."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning", reason="pip install '.[test]'")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from tiny_llama import (  # noqa: E402
    assert_same,
    assert_stepped_by_scale,
    batch,
    plain_loop,
    rows,
    tiny_llama,
    weights,
)

import optimzoo  # noqa: E402

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore:.*:UserWarning")]


def decay(step):
    return 1 / (1 + step)


class Module(lightning.LightningModule):
    def __init__(self, name, hyper):
        super().__init__()
        self.model, self.name, self.hyper = tiny_llama(), name, hyper

    def training_step(self, inputs, index):
        return self.model(**inputs).loss

    def configure_optimizers(self):
        optimizer = optimzoo.create_optimizer(self.name, self.model, **self.hyper)
        scheduler = {"scheduler": LambdaLR(optimizer, decay), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def fitted(path, name, hyper, steps, resume=None, examples=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_steps=steps, default_root_dir=path, **{**quiet, **fixed, **options}
    )
    module = Module(name, hyper)
    module.before = weights(module.model)
    data = DataLoader(examples or rows(8), batch_size=2, collate_fn=batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer, module


@pytest.mark.parametrize("name", ["scale", "fira"])
def test_it_trains_with_the_class_and_as_a_plain_loop_does(name, tmp_path):
    hyper = {"scale": {"lr": 3e-3, "vector_lr": 1e-2}, "fira": {"lr": 3e-3, "rank": 4}}[name]
    trainer, module = fitted(tmp_path, name, hyper, 4)
    assert type(trainer.optimizers[0]) is optimzoo.get_info(name).make
    plain = tiny_llama()
    expected = optimzoo.create_optimizer(name, plain, **hyper)
    follow = LambdaLR(expected, decay)
    for i in range(4):
        plain_loop(plain, expected, [batch(rows(8)[2 * i : 2 * i + 2])])
        follow.step()
    assert_same(weights(module.model), weights(plain))


def test_one_step_under_clipping_moves_every_column_by_lr(tmp_path):
    hyper = {"lr": 3e-3, "vector_lr": 1e-2}
    trainer, module = fitted(tmp_path, "scale", hyper, 1, gradient_clip_val=0.01)
    assert type(trainer.optimizers[0]) is optimzoo.SCALE
    assert_stepped_by_scale(module.before, module.model, 3e-3)


def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path):
    hyper = {"lr": 3e-3, "vector_lr": 1e-2}
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    saving = {"enable_checkpointing": True, "callbacks": [keep]}
    # Every batch is the same one: Lightning 2.6 resumes a finished epoch with one batch too many.
    same = rows(2) * 4
    whole_trainer, whole = fitted(tmp_path, "scale", hyper, 8, examples=same, **saving)
    half = tmp_path / "epoch=0.ckpt"
    resumed_trainer, resumed = fitted(tmp_path, "scale", hyper, 8, half, same)
    assert resumed_trainer.global_step == whole_trainer.global_step == 8
    assert type(resumed_trainer.optimizers[0]) is optimzoo.SCALE
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.get_parameter(name)), name
