"""What fct raises. Bad arguments are ``ValueError`` or ``TypeError``; these are for what has a name of its own."""

from __future__ import annotations


class FctError(Exception):
    """Base of the errors that are neither a bad value nor a bad type: a file that is no artifact, say."""


class SpaceMismatchError(FctError, ValueError):
    """Vectors of two embedding models would have been mixed."""


class ArtifactError(FctError, ValueError):
    """A file is not what its name says: truncated, foreign or of another version."""


class BackendError(FctError, RuntimeError):
    """No backend can run the request, or the one that was forced cannot; the message has every reason."""


class FctWarning(UserWarning):
    """Something the user should know that does not stop the work."""
