"""The one error of this package."""

# What code meets that reads a file in which anything may stand in any place.
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class CheckpointError(ValueError):
    """A file of weights that is damaged, unsafe, or does not fit the model."""
