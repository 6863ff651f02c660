"""The model folder: the contract between conversion and use."""
