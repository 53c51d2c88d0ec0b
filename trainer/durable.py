"""Files that survive a crash: written whole or not at all, and on the disk before the call returns."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Puts a file's content, or a folder's list of names, on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Creates or replaces `path` with `content`: a crash leaves the old file or the new one; raises OSError."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
