"""What the optimizers share: their base class, Adam's rule, roles, compiled steps."""
