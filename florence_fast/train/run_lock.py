"""Lock of a run's folder: a second run that would write there is refused."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_held: set[Path] = set()


class RunInUseError(RuntimeError):
    """Another run that is still alive writes to the folder."""


class RunLock:
    """Hold the lock of a run's folder inside a ``with`` block.

    It is a record lock of the operating system: it ends with the process however that ends, so that none is ever
    stale; it also holds between machines on a network drive; and decoding workers, which may outlive a killed run for
    a moment, do not inherit it. Where a drive has no locks, a line in the log says so and nothing is held.

    Args:
        folder: made if need be.

    Raises:
        RunInUseError: a living run holds the lock; the message says which process on which machine.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._path = self.folder / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self._path.resolve()
        # A process does not exclude itself, and would lose its lock by closing the file a second time.
        if self._path in _held:
            raise RunInUseError(f"{self.folder} is in use by another run of this process")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise RunInUseError(f"{self.folder} is in use by a run that is still alive: {holder}") from error
            logger.warning("%s cannot be locked (%s): start no second run there", self.folder, error.strerror)
            return self
        self._descriptor = descriptor
        _held.add(self._path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            _held.discard(self._path)
            os.close(self._descriptor)
            self._descriptor = None
