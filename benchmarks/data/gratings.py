"""Generated images of gratings, as a corpus: a classifier's task without a download."""

import hashlib

import numpy as np

from benchmarks.data.corpus import Corpus

CLASSES = 10  # orientations of the stripes
SIDE = 16
LEVELS = 16  # of grey
WINDOW = SIDE * SIDE + 1  # the pixels of an image, then its class
NOISE = 1.2  # standard deviation; that of the stripes is about 0.4
_COUNTS = (16_384, 2_048, 2_048)  # images to train, to validate and to test


def grating_corpus() -> Corpus:
    """Return 16,384 training images [16, 16] of stripes under noise, and 2,048 of each other split.

    A split is a row of windows, each the pixels of an image as grey levels 0 to 15, and its class:
    the orientation of its stripes. Wavelength (3 to 8 pixels), phase and contrast are random, so
    the mean of no class differs from another's, and the noise keeps any model from certainty.
    """
    train, valid, test = (
        _split(count, np.random.default_rng(seed)) for seed, count in enumerate(_COUNTS)
    )
    digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens in (train, valid, test)))
    return Corpus("gratings", digest.hexdigest(), LEVELS, train, valid, test)


def _split(count: int, random: np.random.Generator) -> np.ndarray:
    classes = random.integers(0, CLASSES, count)
    angle = np.pi * classes / CLASSES
    wave = 2 * np.pi / random.uniform(3, 8, count)
    phase, contrast = random.uniform(0, 2 * np.pi, count), random.uniform(0.3, 0.9, count)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    stripes = np.sin(wave[:, None, None] * along + phase[:, None, None])
    images = contrast[:, None, None] * stripes + NOISE * random.standard_normal(stripes.shape)
    levels = np.clip(np.round((images / 4 + 0.5) * (LEVELS - 1)), 0, LEVELS - 1)
    windows = np.concatenate((levels.reshape(count, -1), classes[:, None]), 1)
    return np.append(windows, 0).astype(np.uint16)  # the label after the last window
