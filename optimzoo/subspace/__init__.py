"""Subspaces and spectra: what the matrix methods compute on a gradient."""
