"""Writing files so that a crash, a full disk or a second process never leaves half of one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a staged file beside ``path`` that replaces it when the block ends without an error.

    The staged file lies in the same folder, hence on the same file system, where a rename is atomic. It is written to
    the disk before the rename, and removed if the block fails.

    Args:
        path: The file to write; missing folders are made.

    Raises:
        OSError: If the folder cannot be written to or the disk is full; names ``path``, which is then what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with naming(path):
            yield staged
            with staged.open("rb") as written:
                os.fsync(written.fileno())
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Name the file in errors of writing that do not, as where the disk is full.

    Args:
        path: The file.
        others: What its writer raises in place of ``OSError``.

    Raises:
        OSError: In place of these errors, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except others as error:
        raise OSError(errno.EIO, f"cannot be written; is the disk full? {error}", str(path)) from error


def append(path: Path, content: bytes) -> None:
    """Append to a file in one write, after which a crash loses nothing and other processes can append theirs.

    Raises:
        OSError: If it cannot be written to or the disk is full; the file is then what it was, unless another process
            has appended to it meanwhile.
    """
    with path.open("ab", buffering=0) as file:
        before, rest = file.seek(0, os.SEEK_END), content
        try:
            while rest:  # a disk that becomes full takes a part, and refuses the rest
                rest = rest[file.write(rest) :]
        except OSError as error:
            if file.seek(0, os.SEEK_END) == before + len(content) - len(rest):
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error
