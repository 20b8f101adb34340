"""What single steps, layers and plans cost in time and memory."""
