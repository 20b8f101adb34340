"""Subspaces and spectra: what the matrix methods compute on a gradient."""

from optimzoo.subspace.bases import leading_basis

__all__ = ["leading_basis"]
