"""Local sources give the same documents whatever their paths; a path or record that cannot serve is named exactly."""

import json
import re
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.config import SourceConfig
from data.source import StreamReader, read_documents
from data.split import Text
from tests.data.corpus import documents_of, made_up_texts, write_texts

TEXTS = made_up_texts(30, 4)


def read(report=lambda line: None, **settings: str) -> tuple[str, ...]:
    return tuple(one.text for one in read_documents("mine", SourceConfig(**settings), report).texts)


def read_in_order(texts: list[str]) -> tuple[str, ...]:
    return tuple(one.text for one in documents_of(texts).texts)


def write_json(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_standard_library_without_its_tests_and_without_this_installation() -> None:
    texts = read(kind="stdlib")
    library = Path(sysconfig.get_path("stdlib"))
    assert len(texts) > 400
    assert (library / "json" / "decoder.py").read_bytes().decode() in texts
    for path in [library / "test" / "test_json" / "test_decode.py", *library.glob("_sysconfigdata*.py")]:
        assert not path.exists() or path.read_bytes().decode() not in texts


def test_neither_paths_nor_duplicates_matter(tmp_path: Path) -> None:
    one = write_texts(tmp_path / "one", TEXTS)
    other = write_texts(tmp_path / "other" / "deeper", [*reversed(TEXTS), TEXTS[0], ""])
    assert read(kind="text", path=str(one)) == read(kind="text", path=str(other.parent))
    assert sorted(read(kind="text", path=str(one))) == sorted(TEXTS)


def test_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", TEXTS)
    assert read(kind="text", path=str(folder / "0003.txt")) == (TEXTS[3],)
    assert set(read(kind="text", path=str(folder / "000*.txt"))) == set(TEXTS[:10])
    assert set(read(kind="text", path=str(tmp_path / "**" / "002*.txt"))) == set(TEXTS[20:30])


def test_hidden_files_stay_out_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", ["one\r\ntwo\ufeff"])
    write_texts(folder / ".git", ["hidden"])
    (folder / ".note").write_text("hidden")
    assert read(kind="text", path=str(folder)) == ("one\r\ntwo\ufeff",)


def test_what_is_not_utf8_is_left_out_and_reported(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", TEXTS[:3])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    lines: list[str] = []
    assert set(read(lines.append, kind="text", path=str(folder))) == set(TEXTS[:3])
    assert len(lines) == 1
    assert "left out 1 files" in lines[0]
    assert "latin.txt" in lines[0]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_path_without_a_match_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "*.nothing", tmp_path / "empty"):
        with pytest.raises(
            ValueError, match=rf"data.sources.mine.path = '{re.escape(str(path))}': expected a file, or"
        ):
            read(kind=kind, path=str(path))


def test_jsonl_gives_one_document_per_record(tmp_path: Path) -> None:
    records = [{"body": text, "id": i} for i, text in enumerate(TEXTS)] + [{"body": None}, {"body": ""}]
    path = write_json(tmp_path / "a.jsonl", records)
    path.write_text(path.read_text() + "\n  \n")
    expected = read_in_order(TEXTS)
    assert read(kind="jsonl", path=str(path), field="body") == expected
    assert read(kind="jsonl", path=str(tmp_path), field="body") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a", "other": "b"}', r"field = 'text': expected a field of .*a.jsonl:2; the nearest are txt, other"),
        ("{}", r"field = 'text': expected a field of .*a.jsonl:2; the nearest are none"),
        ('{"text": 5}', r"field = 'text': expected a field that holds text; .*a.jsonl:2 has int"),
        ('{"text": "\\ud800"}', r"field = 'text': expected text that UTF-8 can hold; .*a.jsonl:2: surrogates"),
        ('{"text": "cut', r"path = .*a.jsonl:2: expected one JSON object per line"),
        ('"text"', r"path = .*a.jsonl:2: expected one JSON object per line"),
        (b'{"text": "caf\xe9"}', r"path = .*a.jsonl:2: expected one JSON object per line"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + bad + b"\n")
    with pytest.raises(ValueError, match=r"^data.sources.mine." + message):
        read(kind="jsonl", path=str(tmp_path / "a.jsonl"))


def test_parquet_gives_one_document_per_record(tmp_path: Path) -> None:
    for part, texts in enumerate((TEXTS[:20], [*TEXTS[20:], None])):
        parquet.write_table(pyarrow.table({"body": texts, "id": range(len(texts))}), tmp_path / f"{part}.parquet")
    assert read(kind="parquet", path=str(tmp_path), field="body") == read_in_order(TEXTS)
    with pytest.raises(ValueError, match=r"mine.field = 'bodi': expected a field of .*0.parquet; the nearest are body"):
        read(kind="parquet", path=str(tmp_path), field="bodi")
    with pytest.raises(ValueError, match=r"mine.field = 'id': expected a field that holds text; .* has int"):
        read(kind="parquet", path=str(tmp_path), field="id")


PROMPTED = [{"ask": "q1 ", "text": "one"}, {"ask": None, "text": "two"}, {"ask": "q3 ", "text": ""}]
BAD_PROMPTS = [
    ("aks", "asc", r"prompt_field = 'asc': expected a field of .*; the nearest are aks"),
    ("ask", "number", r"prompt_field = 'number': expected a field that holds text; .* has int"),
]


def test_a_prompt_is_read_with_its_text_from_every_kind_of_record(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", PROMPTED)
    parquet.write_table(pyarrow.Table.from_pylist(PROMPTED), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        config = SourceConfig(kind=kind, path=str(tmp_path / f"a.{kind}"), prompt_field="ask")
        found = read_documents("mine", config, lambda line: None).texts
        assert sorted(found) == [Text("one", "q1 "), Text("two")]
    assert stream_reader(path, prompt_field="ask").read(0, 2) == [Text("one", "q1 "), Text("two")]


@pytest.mark.parametrize(("key", "asked", "message"), BAD_PROMPTS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_prompt_field_that_is_not_there_or_no_text_is_refused(
    tmp_path: Path, kind: str, key: str, asked: str, message: str
) -> None:
    records = [{key: "q", "text": "one", "number": 3}]
    write_json(tmp_path / "a.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^data.sources.mine." + message):
        read(kind=kind, path=str(tmp_path / f"a.{kind}"), prompt_field=asked)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"data.sources.mine.path = .*a.parquet: expected a parquet file"):
        read(kind="parquet", path=str(tmp_path))


def stream_reader(path: Path, **settings: str) -> StreamReader:
    return StreamReader("mine", SourceConfig(kind="stream", name="json", path=str(path), **settings))


def test_a_stream_can_be_read_from_any_record(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"text": text} for text in TEXTS])
    reader = stream_reader(path)
    for first, count in [(0, 7), (7, 7), (14, 7), (3, 4), (3, 4), (28, 7), (35, 7), (0, 30), (0, 31), (100, 1)]:
        expected = [Text(text) for text in TEXTS[first : first + count]]
        assert reader.read(first, count) == expected
        assert stream_reader(path).read(first, count) == expected


def test_a_stream_counts_records_without_text(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"text": "one"}, {"text": None}, {"text": "three"}])
    assert stream_reader(path).read(0, 3) == [Text("one"), Text(""), Text("three")]


def test_a_stream_through_an_address(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [{"text": text} for text in TEXTS])
    source = SourceConfig(kind="stream", name="json", path=f"file://{tmp_path}/*.json")
    assert StreamReader("mine", source).read(2, 3) == [Text(text) for text in TEXTS[2:5]]


def test_a_stream_that_cannot_be_opened_or_lacks_the_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.mine.path = .*missing.* expected what `datasets` can stream"):
        stream_reader(tmp_path / "missing.json")
    path = write_json(tmp_path / "a.json", [{"txt": "one"}])
    with pytest.raises(ValueError, match=r"data.sources.mine.path = .*split=test.*: expected what `datasets` can"):
        stream_reader(path, split="test")
    with pytest.raises(ValueError, match=r"data.sources.mine.field = 'text': .*; the nearest are txt"):
        stream_reader(path).read(0, 1)
