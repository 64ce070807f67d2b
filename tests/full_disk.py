"""A file on a disk that is full: Linux' /dev/full, elsewhere what stands for it."""

import errno
import io
import os
from pathlib import Path

DEVICE = Path("/dev/full")


class Full(io.RawIOBase):
    """A file whose every write finds the disk full."""

    def writable(self) -> bool:
        """It can be written to, without success."""
        return True

    def write(self, data: object, /) -> int:
        """Refused.

        Raises:
            OSError: ENOSPC.
        """
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def opened() -> io.RawIOBase:
    """The file, without a buffer."""
    return io.FileIO(DEVICE, "w") if DEVICE.exists() else Full()
