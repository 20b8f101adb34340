"""A running optimizer's state for another optimizer."""

from optimzoo.state_transfer.adopt import adopt_state
from optimzoo.state_transfer.report import AdoptedState, AdoptionReport

__all__ = ["AdoptedState", "AdoptionReport", "adopt_state"]
