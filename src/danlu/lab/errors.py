"""Errors that are the user's to mend: the command line prints them as one line, without a traceback."""

__all__ = ["LabError", "MissingExtraError", "RunError", "StoreError", "TrialError"]


class LabError(Exception):
    """Something outside the code is wrong; the message is one line that names the cause and the remedy."""


class MissingExtraError(LabError):
    """A package of an extra is not installed; the message has the command that installs it."""


class TrialError(LabError):
    """A trial does not exist, or its declaration contradicts itself."""


class StoreError(LabError):
    """The folder of stored runs cannot be read or written."""


class RunError(LabError):
    """A fit failed."""
