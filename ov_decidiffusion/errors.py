"""The errors that this library raises beyond Python's own; all of them are ``DeciDiffusionError``."""


class DeciDiffusionError(Exception):
    """Something that the caller can act on; the message says what is wrong and what to do."""


class CheckpointError(DeciDiffusionError, ValueError):
    """A checkpoint cannot be found, downloaded or used."""


class ConversionError(DeciDiffusionError, RuntimeError):
    """A converted model does not agree with the PyTorch model that it came from."""


class ModelDirError(DeciDiffusionError, ValueError):
    """A model folder is incomplete, or a file in it is damaged."""


class NotEnoughMemory(DeciDiffusionError, ValueError):
    """Something needs more memory than is free."""
