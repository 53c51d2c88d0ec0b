"""Files of the cache: each written whole or not at all, and never changed, so that processes can share a folder."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def cache_folder(cache_dir: str, kind: str) -> Path:
    """Return the folder of one kind of cached thing, made if need be; raises ValueError when it cannot be made."""
    folder = Path(cache_dir).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir = {cache_dir}: expected a folder that can be written ({error})") from error
    return folder


def write_once(path: Path, content: bytes) -> None:
    """Put a file at `path`, whole or not at all; a file of the same name that another process wrote is replaced."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_folder_once(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Put a folder of raw arrays at `folder`, whole or not at all; one that another process wrote meanwhile stays."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
    try:
        for name, array in arrays.items():
            with (temporary / name).open("wb") as file:
                array.tofile(file)
                file.flush()
                os.fsync(file.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
