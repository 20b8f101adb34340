"""One training run: its configuration, its loop, its state."""
