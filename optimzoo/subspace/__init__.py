"""Subspaces and spectra of gradients, for the matrix methods."""

from optimzoo.subspace.bases import leading_basis

__all__ = ["leading_basis"]
