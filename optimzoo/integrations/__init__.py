"""What other training tools need to use these optimizers; nothing is imported before it is used."""
