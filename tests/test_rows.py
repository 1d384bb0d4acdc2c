"""Local files of rows: what is accepted, and the line in every message."""

import json

import pytest

from nlp_ext.rows import read_rows

A, B = {"text": "café", "n": 1}, {"text": 'b, "c"', "n": None}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (A, B))


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", LINES, [":1", ":2"]),
        ("a.json", LINES, [":1", ":2"]),
        ("A.JSONL", LINES, [":1", ":2"]),
        ("a.jsonl", "\ufeff" + LINES, [":1", ":2"]),
        ("a.jsonl", LINES.replace("\n", "\r\n").rstrip(), [":1", ":2"]),
        ("a.jsonl", "\n  \n" + LINES.replace("\n", "\n\n") + "\n", [":3", ":5"]),
        ("a.json", json.dumps([A, B]), [", example 1", ", example 2"]),
        ("a.jsonl", json.dumps([A, B], indent=2), [", example 1", ", example 2"]),
    ],
)
def test_json_as_it_is_written(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_rows(path) == [(f"{path}{place}", row) for place, row in zip(places, (A, B), strict=True)]


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(A, indent=2))
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [A]


def test_csv_is_text(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffx,y\r\n"a, ""b""\nc",NA\r\n\r\n1,\r\n'.encode())
    places, rows = zip(*read_rows(tmp_path / "a.csv"), strict=True)
    assert rows == ({"x": 'a, "b"\nc', "y": "NA"}, {"x": "1", "y": ""})
    assert [place.rpartition(":")[2] for place in places] == ["3", "5"]


def test_long_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5_000_000}) + "\n")
    assert len(read_rows(tmp_path / "a.jsonl")[0][1]["text"]) == 5_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n\t", "is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "is empty"),
        ("a.json", b"[]", "has no examples"),
        ("a.jsonl", LINES.encode("utf-16"), ":1 has the byte 0xff, so it is not UTF-8 .*: save it as UTF-8"),
        ("a.jsonl", b'{"a": "b"}\n'.decode().encode("utf-16-le"), ":1 has a NUL byte, so it is not UTF-8"),
        ("a.jsonl", b"{}\n" + LINES.encode("latin-1"), ":2 has the byte 0xe9, so it is not UTF-8"),
        ("a.csv", "x\ncaf\u00e9\n".encode("latin-1"), ":2 has the byte 0xe9, so it is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r":3 is not JSON \(.*column 7\); needed is an object on every line"),
        ("a.jsonl", b'{"a": 1}\n{"b": "c', r":2 is not JSON \(Unterminated string"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n]', r":3 is not JSON|:2 is not JSON"),
        ("a.json", b'{\n"a": 1,\n"b" 2}', ":3 is not JSON"),
        ("a.json", b"[" * 100_000, ":1 is not JSON .*recursion"),
        ("a.jsonl", b"a,b\n1,2\n", ":1 is not JSON"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', r":1 is not JSON \(a occurs twice\)"),
        ("a.jsonl", b"{}\nnull\n", ":2 is None; needed is an object"),
        ("a.jsonl", b'"a"\n"b"\n', ":1 is 'a'; needed is an object"),
        ("a.json", b'[[{"a": 1}]]', r", example 1 is \[\{'a': 1\}\]; needed is an object"),
        ("a.csv", b"x,y\n1,2\n3\n", ":3 has not the 2 columns of the first"),
        ("a.csv", b"x,y\n1,2,3\n", ":2 has not the 2 columns of the first"),
        ("a.csv", b'x,y\n"1,2\n', ":2 is not CSV"),
        ("a.csv", b"x,y\n", "has no examples"),
        ("a.parquet", b"PAR1", "is not Parquet"),
        ("a.parquet", LINES.encode(), "is not Parquet"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}( |){message}"):
        read_rows(tmp_path / name)
