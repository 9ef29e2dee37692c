"""One writer at a time: a lock of the system where there is one, else a file with a heartbeat."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from fct.backfilling.checked_json import SchemaError, number, parse, record, sealed, text, unsealed
from fct.backfilling.confined import open_confined, read_confined
from fct.checks import shown
from fct.errors import BackfillError, InUseError
from fct.gallery.location import Location, RetryPolicy
from fct.terminal import plain_log

__all__ = ["hold"]

_log = plain_log("fct.gallery")
# What file systems without locks answer: NFS without lockd, FUSE, object stores that are mounted.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_LOCK_BYTES = 4096
_RENEW, _STALE = 10.0, 60.0  # seconds


@contextlib.contextmanager
def hold(lock: Location, destination: str) -> Iterator[None]:
    """Holds the destination for this process, by its lock file.

    On a local disk an flock, which the system drops when its holder dies. Where there is none (object stores, some
    network file systems) the file has a heartbeat: it is taken over when it has not been renewed for a minute.

    Raises:
        InUseError: another process holds it. BackfillError: the lock file is a link or no file, or cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if not lock.is_local or not stack.enter_context(_flock(lock, destination)):
            stack.enter_context(_heartbeat(lock, destination))
        yield


@contextlib.contextmanager
def _flock(lock: Location, destination: str) -> Iterator[bool]:
    """Yields False where the file system knows no locks."""
    import fcntl

    path = lock.local
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_confined(path.parent.parent, f"{path.parent.name}/{path.name}", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackfillError(
            f"destination: the lock {path} could not be made: {reason}; put this right and start again"
        ) from error
    with os.fdopen(descriptor, "r+") as file:
        if os.fstat(descriptor).st_nlink > 1:
            raise BackfillError(
                f"destination: the lock {path} is also a file of another name (a hard link), which would be "
                "overwritten: remove it"
            )
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(_in_use(destination, _line(file.read(200)) or "another process")) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise BackfillError(
                    f"destination: the lock {path} could not be taken: {error.strerror or error}; put this right and "
                    "start again"
                ) from error
            _log.warning("destination: the file system of %s has no locks; a heartbeat in it takes their place", path)
            yield False
            return
        file.truncate(0)
        file.write(_me())
        file.flush()
        yield True


def _line(written: str) -> str:
    """What a lock says about its holder, as it may be shown: it is somebody else's text."""
    return written if written.isprintable() else shown(written)


def _in_use(destination: str, holder: str, more: str = "") -> str:
    return f"destination: {destination} is being written by {holder}{more}; wait for it or stop it"


@contextlib.contextmanager
def _heartbeat(lock: Location, destination: str, renew: float = _RENEW) -> Iterator[None]:
    hasty = replace(lock, retry_policy=RetryPolicy(0, min(renew, lock.retry_policy.timeout)))
    _refuse_holder(lock, destination)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(renew):
            with contextlib.suppress(Exception):  # the next beat tries again; shards are safe without
                hasty.write_bytes(_beat())

    lock.write_bytes(_beat())
    thread = threading.Thread(target=beat, name="fct-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):  # a store that is down: the lock goes stale, the first error stands
            hasty.remove()


def _refuse_holder(lock: Location, destination: str) -> None:
    """Raises InUseError where another process renewed the lock less than a minute ago. What is no lock is replaced."""
    try:
        if lock.is_local:
            base = lock.local.parent.parent
            data = read_confined(base, f"{lock.local.parent.name}/{lock.name}", _LOCK_BYTES)
        elif lock.version().bytes <= _LOCK_BYTES:
            data = lock.read_bytes()
        else:
            return
        who, when = _LOCK(unsealed(parse(data, _LOCK_BYTES)), "")
    except (FileNotFoundError, SchemaError):
        return
    age = time.time() - when
    if age >= _STALE or who == _me() or _died(who):
        return
    if age < -_STALE:
        raise InUseError(
            f"destination: {destination} is locked by {_line(who)} with a time {-age:,.0f} s ahead of this machine's "
            f"clock: set the clocks right, or remove {lock} if nobody is at it"
        )
    raise InUseError(
        _in_use(destination, _line(who), f" ({max(0.0, age):.0f} s ago; a minute after its end it is free)")
    )


def _died(who: str) -> bool:
    """Whether the holder was a process of this machine and is gone."""
    words = who.split()
    if len(words) != 4 or words[0] != "process" or not words[1].isascii() or not words[1].isdigit():
        return False
    if words[3] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _beat() -> bytes:
    return sealed({"who": _me(), "time": time.time()})


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


_LOCK = record(lambda who, time: (who, time), who=text(300), time=number(0.0, 1e12))
