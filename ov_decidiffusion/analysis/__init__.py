"""What the tutorial looks into a model with."""
