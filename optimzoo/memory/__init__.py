"""Memory of training: exact bytes, the peak simulated from shapes, the peak as measured."""

from optimzoo.memory.account import Account, account
from optimzoo.memory.measure import Measurement, measure, measure_script
from optimzoo.memory.simulate import (
    Simulation,
    checkpoint_blocks,
    language_model_step,
    simulate,
)
from optimzoo.memory.tracker import Peak

__all__ = [
    "Account",
    "Measurement",
    "Peak",
    "Simulation",
    "account",
    "checkpoint_blocks",
    "language_model_step",
    "measure",
    "measure_script",
    "simulate",
]
