"""Where text comes from: local files read whole, and streams read by position. The one door to `datasets`."""

import difflib
import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.config import Report, SourceConfig
from data.split import Documents, Text, order_by_content

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
BUILD_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")
"""Files and folders that belong to one installation: they hold its paths and compiler flags, not the library's text."""
FILE_FORMATS = frozenset({"json", "parquet", "text", "csv", "arrow"})
"""Values of `name` that make `path` of a stream a file or fsspec address instead of a data set."""


def read_documents(name: str, config: SourceConfig, report: Report) -> Documents:
    """Read a local source (every kind but `stream`) whole into memory, without duplicates, ordered by content hash.

    Files that are not UTF-8 or cannot be read are left out and reported.
    Raises ValueError for a path without a match, a record without the field, or a file of another format.
    """
    try:
        return order_by_content(_texts(name, config, report))
    except OSError as error:
        raise _refusal(name, "path", repr(config.path), f"files that can be read ({error})") from error


def _texts(name: str, config: SourceConfig, report: Report) -> Iterator[Text]:
    if config.kind == "stdlib":
        return _read_files(name, _library_files(), report)
    if config.kind == "text":
        return _read_files(name, _matches(name, config, ""), report)
    if config.kind == "jsonl":
        return _json_texts(name, config, _matches(name, config, ".jsonl"))
    assert config.kind == "parquet"
    return _parquet_texts(name, config, _matches(name, config, ".parquet"))


class StreamReader:
    """Records of a `stream` source by number: the number is the only state, an open iterator only saves time."""

    def __init__(self, name: str, config: SourceConfig) -> None:
        """Open the data set; raises ValueError when `datasets` cannot stream it."""
        self._name, self._config = name, config
        self._dataset = _open_stream(name, config)
        self._records: Iterator[dict[str, Any]] = iter(())
        self._position = -1
        self._last: tuple[int, int, list[Text]] = (0, 0, [])

    def read(self, first: int, count: int) -> list[Text]:
        """Return the texts of records first to first + count, fewer only at the end; empty for a record without text.

        Going on where the last call ended costs nothing extra; any other place reads the stream from its start.
        Raises ValueError for a record without the field.
        """
        if self._last[:2] == (first, count):
            return self._last[2]
        if self._position != first:
            self._records = iter(self._dataset.skip(first))
        self._position = -1
        where = f"a record of {self._config.path}"
        texts = [
            _text(self._name, self._config, record, where)
            for _, record in zip(range(count), self._records, strict=False)
        ]
        self._position = first + len(texts)
        self._last = (first, count, texts)
        return texts


def _open_stream(name: str, config: SourceConfig) -> Any:
    from datasets import load_dataset

    try:
        if config.name in FILE_FORMATS:
            return load_dataset(config.name, data_files=config.path, split=config.split, streaming=True)
        return load_dataset(config.path, config.name, split=config.split, streaming=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        asked = f"{config.path!r} (name={config.name}, split={config.split})"
        raise _refusal(name, "path", asked, f"what `datasets` can stream ({reason})") from error


def _library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, SKIPPED_FOLDERS):
        of_build = any(part.startswith(BUILD_PREFIXES) for part in path.relative_to(root).parts)
        if path.suffix == ".py" and not of_build:
            yield path


def _matches(name: str, config: SourceConfig, suffix: str) -> list[Path]:
    """Return the files a path stands for: itself, what a folder holds (hidden names left out), or a glob's matches."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        found = [file for file in _walk(path, frozenset()) if file.name.endswith(suffix)]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
        if path.is_file():
            found = [path]
    if not found:
        wanted = f"{suffix} file" if suffix else "file"
        expected = f"a file, or a folder or glob with at least one {wanted} (looked from {Path.cwd()})"
        raise _refusal(name, "path", repr(config.path), expected)
    return sorted(found)


def _walk(folder: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [entry for entry in folders if entry not in skipped and not entry.startswith(".")]
        yield from (Path(parent, file) for file in files if not file.startswith("."))


def _read_files(name: str, paths: Iterable[Path], report: Report) -> Iterator[Text]:
    skipped = []
    for path in paths:
        try:
            yield Text(path.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            skipped.append(path)
    if skipped:
        report(f"{name}: left out {len(skipped)} files that are not readable UTF-8, such as {min(skipped)}")


def _json_texts(name: str, config: SourceConfig, paths: Iterable[Path]) -> Iterator[Text]:
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if line.strip():
                    yield _text(name, config, _json_record(name, line, where), where)


def _json_record(name: str, line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise _refusal(name, "path", where, "one JSON object per line, in UTF-8")
    return record


def _parquet_texts(name: str, config: SourceConfig, paths: Iterable[Path]) -> Iterator[Text]:
    import pyarrow
    from pyarrow import parquet

    fields = _fields(config)
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise _refusal(name, "path", path, f"a parquet file ({error})") from error
        with file:
            for key, field in fields.items():
                _require_field(name, key, field, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=list(fields.values())):
                for record in batch.to_pylist():
                    yield _text(name, config, record, str(path))


def _fields(config: SourceConfig) -> dict[str, str]:
    """Return the fields that are read of a record, by the key that names them."""
    prompt = {} if config.prompt_field is None else {"prompt_field": config.prompt_field}
    return {"field": config.field} | prompt


def _text(name: str, config: SourceConfig, record: dict[str, Any], where: str) -> Text:
    """Return a record's text and prompt, "" for a null."""
    return Text(*(_string(name, key, field, record, where) for key, field in _fields(config).items()))


def _string(name: str, key: str, field: str, record: dict[str, Any], where: str) -> str:
    _require_field(name, key, field, record, where)
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _refusal(name, key, repr(field), f"a field that holds text; {where} has {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(name, key, repr(field), f"text that UTF-8 can hold; {where}: {error.reason}") from error
    return text


def _require_field(name: str, key: str, field: str, known: Iterable[str], where: str) -> None:
    fields = list(known)
    if field not in fields:
        near = difflib.get_close_matches(field, fields, n=3, cutoff=0.0)
        raise _refusal(name, key, repr(field), f"a field of {where}; the nearest are {', '.join(near) or 'none'}")


def _refusal(name: str, key: str, value: object, expected: str) -> ValueError:
    return ValueError(f"data.sources.{name}.{key} = {value}: expected {expected}")
