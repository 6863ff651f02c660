"""Tools with which the tutorial looks into a model."""
