"""Time and memory of single steps, layers and plans."""
