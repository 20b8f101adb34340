"""Base classes, Adam's rule, roles and compiled steps that the optimizers share."""
