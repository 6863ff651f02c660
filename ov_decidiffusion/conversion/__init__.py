"""Conversion of a PyTorch checkpoint to a model folder."""
