"""Optimizers, one file per method."""
