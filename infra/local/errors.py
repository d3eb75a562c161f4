"""The one error of the embedded stack; its text says what is wrong, the rule, and the remedy."""


class StackError(RuntimeError):
    """The embedded stack cannot be used or started."""
