"""Comparison of the papers' tables with ours."""
