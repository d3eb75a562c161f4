"""The one error of this package."""


class CheckpointError(ValueError):
    """A file of weights that is damaged, unsafe, or does not fit the model."""
