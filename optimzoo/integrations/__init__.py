"""Adapters for other training tools, which are imported on use."""
