"""What fct raises. Bad arguments are ``ValueError`` or ``TypeError``; these are for what has a name of its own.

Texts are made where a thing is checked: of rows in fct.rows, of numbers and paths in fct.checks.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendError",
    "BackfillError",
    "DeviceLostError",
    "FctError",
    "FctWarning",
    "InUseError",
    "MissingExtraError",
    "QualityGateError",
    "RejectLimitError",
    "SpaceMismatchError",
    "StoreError",
]


class FctError(Exception):
    """Base of the errors that are neither a bad value nor a bad type: a file that is no artifact, say."""


class SpaceMismatchError(FctError, ValueError):
    """Vectors of two embedding models would have been mixed."""


class ArtifactError(FctError, ValueError):
    """A file is not what its name says: truncated, foreign or of another version."""


class BackendError(FctError, RuntimeError):
    """No backend can run the request, or the one that was forced cannot; the message has every reason."""


class DeviceLostError(BackendError):
    """The device failed in the middle of the work (removed, illegal access): nothing after it can be trusted."""


class MissingExtraError(FctError, ImportError):
    """A package that the base install leaves out is needed and not there; the message names the extra."""


class StoreError(FctError, OSError):
    """A store kept failing, or did not answer, for as long as it was to be waited for."""


class BackfillError(FctError):
    """The backfill cannot go on, or must not: the message says why and what to do."""


class InUseError(BackfillError):
    """Another process is writing to the destination."""


class QualityGateError(BackfillError):
    """The expected retrieval quality is below what was asked for."""


class RejectLimitError(BackfillError):
    """More rows were rejected than ``max_rejects`` allows."""


class FctWarning(UserWarning):
    """Something the user should know that does not stop the work."""
