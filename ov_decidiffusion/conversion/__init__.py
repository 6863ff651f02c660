"""A checkpoint of PyTorch weights to a model folder."""
