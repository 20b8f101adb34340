"""Training runs, comparisons and timings of the optimizers: `python -m benchmarks COMMAND`."""
