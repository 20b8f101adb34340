"""Images of gratings as a corpus, and the classifier that reads it."""

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.data.batches import Batches, iterate_eval
from benchmarks.data.gratings import CLASSES, LEVELS, SIDE, WINDOW, grating_corpus
from benchmarks.training.vit import ViT
from optimzoo import param_groups

PIXELS = SIDE * SIDE


@pytest.fixture(scope="module")
def corpus():
    return grating_corpus()


def test_a_split_is_images_and_their_classes(corpus):
    for tokens, count in ((corpus.train, 16_384), (corpus.valid, 2048), (corpus.test, 2048)):
        windows = tokens[:-1].reshape(count, WINDOW)
        assert windows[:, :PIXELS].max() == LEVELS - 1 and windows.dtype == np.uint16
        classes = np.bincount(windows[:, PIXELS])
        assert len(classes) == CLASSES and classes.min() > 0.7 * count / CLASSES
    assert not np.array_equal(corpus.valid, corpus.test)
    assert grating_corpus().sha256 == corpus.sha256


def test_the_orientation_of_the_stripes_is_the_class(corpus):
    windows = corpus.train[:-1].reshape(-1, WINDOW)
    images, classes = windows[:, :PIXELS].reshape(-1, SIDE, SIDE), windows[:, PIXELS]
    spectrum = np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True))) ** 2
    frequency = np.fft.fftfreq(SIDE)
    y, x = np.meshgrid(frequency, frequency, indexing="ij")
    ring = (np.hypot(x, y) > 1 / 8) & (np.hypot(x, y) < 1 / 3)
    for kind in range(CLASSES):
        power = spectrum[classes == kind].mean(0) * ring
        strongest = np.unravel_index(power.argmax(), power.shape)
        angle = np.arctan2(y[strongest], x[strongest]) % np.pi
        off = abs(angle - np.pi * kind / CLASSES)
        assert min(off, np.pi - off) < np.pi / CLASSES, kind


def test_the_loss_is_that_of_the_class_after_the_pixels(corpus):
    model = ViT(seed=3)
    inputs, labels = Batches(corpus.train, 5, WINDOW, seed=0)[0]
    assert torch.equal(inputs[:, PIXELS], labels[:, PIXELS - 1])
    logits = model(inputs).double()
    chosen = logits.softmax(1)[torch.arange(5), inputs[:, PIXELS]]
    assert model(inputs, labels).item() == pytest.approx(-chosen.log().mean().item(), rel=1e-5)
    changed = inputs.clone()
    changed[:, PIXELS] = 0  # the class is no input
    assert torch.equal(model(changed), model(inputs))
    last = list(iterate_eval(corpus.valid, 1000, WINDOW))[-1]
    assert torch.equal(last[0][:, PIXELS], last[1][:, PIXELS - 1])


def test_a_seed_is_a_model_and_leaves_torchs_generator():
    state = torch.get_rng_state()
    one, again, other = ViT(seed=1), ViT(seed=1), ViT(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    assert not torch.equal(one.patches.weight, other.patches.weight)
    first, second = (layer.linear1.weight for layer in list(one.encoder.layers)[:2])
    assert not torch.equal(first, second)


def test_roles_of_the_classifier():
    groups = param_groups(ViT())
    roles = {name: group["role"] for group in groups for name in group["param_names"]}
    assert roles["patches.weight"] == "hidden" and roles["pos_embedding"] == "embedding"
    assert roles["encoder.layers.0.self_attn.in_proj_weight"] == "hidden"
    assert roles["head.weight"] == "head" and roles["norm.weight"] == "vector"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit", "--data", "stdlib"], "--data stdlib: the data of model vit are its own"),
        (["vit", "--max-chars", "9"], "--max-chars 9: the data of model vit are its own"),
        (["nanogpt-char"], "model nanogpt-char reads the characters of a text; give --data FILE"),
        (["vit", "--seq-len", "64"], "a window has 64 numbers; give --seq-len 257"),
    ],
)
def test_data_that_a_model_does_not_take_are_refused(words, message, capsys):
    command = ["train", "--optimizer", "adamw", "--lr", "1e-3", "--steps", "1", "--model", *words]
    assert main(command) == 2
    assert message in capsys.readouterr().err
