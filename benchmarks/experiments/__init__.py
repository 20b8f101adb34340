"""Comparisons of methods: plans, runs side by side, summaries."""
