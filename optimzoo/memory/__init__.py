"""What training needs in memory: exact bytes of weights, gradients and optimizer state."""

from optimzoo.memory.account import Account, account

__all__ = ["Account", "account"]
