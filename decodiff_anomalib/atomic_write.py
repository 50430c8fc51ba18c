"""Writing files so that a crash, a full disk or a second process never leaves half of one."""

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
        OSError: If the folder cannot be written to or the disk is full; ``path`` is then what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield staged
        with staged.open("rb") as written:
            os.fsync(written.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
