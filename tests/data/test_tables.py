"""Data files as a person sees them: their names, their lines, their words, and every refusal with its place."""

import bz2
import gzip
import json
import logging
import os
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from hf_efficient.data import tables
from hf_efficient.data.datasets import load_dataset_any
from hf_efficient.data.preparation import prepare
from hf_efficient.data.tables import read_table
from hf_efficient.errors import DataError

RIGHT, OTHER = "text,label\nright,a\n", "text,label\nwrong,b\n"
NAMES = [
    "x[!a].csv",
    "[[].csv",
    "*.csv",
    "hf:::a.csv",
    "zip::a.csv",
    "~root.csv",
    " .csv",
    "a\tb.csv",
    "%2e.csv",
    "$HOME.csv",
    os.fsdecode(b"caf\xe9.csv"),
]


def written(folder, content, name="x.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_exactly_the_file_of_that_name_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("a.csv", "b.csv", "xa.csv", "xb.csv", "[.csv", "..csv"):
        written(tmp_path, OTHER, other)
    written(tmp_path, RIGHT, name)
    assert read_table(tmp_path / name)["text"] == read_table(name)["text"] == ["right"]
    os.remove(tmp_path / name)
    with pytest.raises(DataError, match="No such data file"):
        read_table(name)


@pytest.mark.parametrize("name", ["a::b", "s3::x[1]*", "~", " ", os.fsdecode(b"\xff")], ids=ascii)
def test_exactly_the_folder_of_that_name_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for where, word in ((tmp_path / name, "right"), (tmp_path / "b", "wrong")):
        texts = [f"{word} {index}" for index in range(10)]
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
        shutil.move(tmp_path / "saved", where)
    loaded = load_dataset_any("./" + name if name != "~" else tmp_path / name)
    assert all(text.startswith("right") for split in loaded.values() for text in split["text"])


@pytest.mark.parametrize("name", ["csv", "text", "imagefolder"])
def test_a_kind_of_file_is_no_data_set(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, RIGHT)
    with pytest.raises(DataError, match="is a kind of file"):
        load_dataset_any(name)


def test_a_file_that_changes_is_read_anew(tmp_path):
    def words():
        return {text for split in load_dataset_any(path).values() for text in split["text"]}

    path = written(tmp_path, "text\n" + "\n".join("abcdefgh"))
    moment = os.stat(path).st_mtime_ns
    assert words() == set("abcdefgh")
    path.write_text("text\n" + "\n".join("ijklmnop"))
    os.utime(path, ns=(moment, moment))
    assert words() == set("ijklmnop")


def test_the_rows_lie_in_a_file_once_and_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch, caplog):
    path = written(tmp_path, "text\n" + "\n".join("abcdefgh"))
    first, again = load_dataset_any(path), load_dataset_any(path)
    assert first["train"].cache_files == again["train"].cache_files != []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)  # a file
    with caplog.at_level(logging.WARNING):
        assert load_dataset_any(path)["train"][:] == first["train"][:]
    assert "stay in memory" in caplog.text


SEEN = [
    ("text,label\nNaN,<NA>\n-,#N/A\n", [("NaN", "<NA>"), ("-", "#N/A")]),
    ("text,label\n1e5,+1\n 007 ,1_000\n", [("1e5", "+1"), (" 007 ", "1_000")]),
    ("\ufefftext,label\r\nTRUE,\r\n,x\r\n", [("TRUE", ""), ("", "x")]),
    ('text,label\n"a ""b"", c\nd",x\n\n\ne"f,y\n', [('a "b", c\nd', "x"), ('e"f', "y")]),
    ("text,label\ra\u2028b\x0b,x\rc,y\r", [("a\u2028b\x0b", "x"), ("c", "y")]),
    ("text,label\n" + "w" * 200_000 + ",2020-01-01\n", [("w" * 200_000, "2020-01-01")]),
]


@pytest.mark.parametrize(("content", "expected"), SEEN, ids=range(len(SEEN)))
def test_text_is_what_was_typed(content, expected, tmp_path):
    rows = read_table(written(tmp_path, content))
    assert list(zip(rows["text"], rows["label"], strict=True)) == expected
    tabs = read_table(written(tmp_path, content.replace(",", "\t"), "x.tsv"))
    assert [tuple(row.values()) for row in tabs] == [tuple(v.replace(",", "\t") for v in row) for row in expected]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_text_is_unpacked_up_to_a_bound(pack, tmp_path, monkeypatch):
    path = written(tmp_path, pack(RIGHT.encode()))
    assert read_table(path)["text"] == ["right"]
    monkeypatch.setattr(tables, "MAX_UNPACKED", 10)
    with pytest.raises(DataError, match="once unpacked"):
        read_table(path)


def test_the_index_that_pandas_writes_has_a_name(tmp_path):
    assert read_table(written(tmp_path, ",text\n0,a\n1,b\n")).column_names == ["Unnamed: 0", "text"]


REFUSED = [
    ("x.csv", 'text,label\n"a\nb",x\nc,y,z\n', r"x\.csv.*line 4 has 3 fields, the header 2.*double quotes"),
    ("x.csv", "text,label\n\na,x\nb\n", "line 4 has 1 fields, the header 2"),
    ("x.tsv", "text\tlabel\na\tb\tc\n", "line 2 has 3 fields"),
    ("x.csv", 'text,label\n"a" b,x\n', "line 2: .*expected after"),
    ("x.csv", 'text,label\na,x\n"b,y\nc,z\n', "line 3: a double quote is opened and never closed"),
    ("x.csv", "a,b,c,b\n1,2,3,4\n", "column 'b' twice"),
    ("x.csv", ",".join(f"c{n}" for n in range(20_000)) + "\n", "20,000 columns, at most 10,000"),
    ("x.csv", "text,label\na,b\n".encode("utf-16-le"), "Save it as UTF-8"),
    ("x.tsv", b"text\nok\n\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9\)"),
    ("x.csv", b"\x1f\x8b\x08\x00broken", "Cannot read"),
    ("x.jsonl", b"(\xb5/\xfd\x00", "a zstd file"),
    ("x.jsonl", '{"a": 1}\n\n{"a": true}\n', r"line 3 has true or false in the column 'a'.*line 1 a number"),
    ("x.json", '[{"a": null}, {"a": "x"}, {"a": [1]}]', "object 3 has a list in the column 'a'.*object 2 text"),
    ("x.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}\n', "line 2 is not JSON: the key 'b' is given twice"),
    ("x.jsonl", '{"a": 1}\n[2]\n', r"line 2 is \[2\], where an object"),
    ("x.jsonl", '{"a": ' + '{"a": ' * 150 + "1" + "}" * 151, "nested deeper than 100"),
    ("x.json", "[" * 200_000, "nested far too deep"),
    ("x.jsonl", f'{{"a": {10**30}}}\n', "the values of 'a' do not fit"),
    ("x.jsonl", "\n".join(json.dumps({f"k{row}-{n}": 1 for n in range(3000)}) for row in range(4)), "different keys"),
    ("x.txt", " \n", "no rows"),
]


@pytest.mark.parametrize(("name", "content", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_told_with_its_place(name, content, words, tmp_path):
    with pytest.raises(DataError, match=words) as told:
        read_table(written(tmp_path, content, name))
    assert name in str(told.value) and len(str(told.value)) < 1500


def test_a_value_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_TEXT", 30)
    for name, row in (("x.csv", "{}"), ("x.txt", "{}"), ("x.jsonl", '{{"text": "{}"}}')):
        head = "text\n" if name == "x.csv" else ""
        assert len(read_table(written(tmp_path, head + row.format("w" * 9), name))) == 1
        with pytest.raises(DataError, match=r"line [12]\b"):
            read_table(written(tmp_path, head + row.format("w" * 40), name))


def test_a_small_parquet_file_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({"text": ["w" * 1000] * 5000}), path)
    assert len(read_table(path)) == 5000 and path.stat().st_size < 100_000
    monkeypatch.setattr(tables, "MAX_BYTES", 2_000_000)
    with pytest.raises(DataError, match="its rows have more than"):
        read_table(path)


def test_json_keeps_types_dates_as_text_and_rows_without_a_key(tmp_path):
    rows = [{"a": "2020-01-01", "b": 1}, {"a": "", "b": 1.5, "c": [{"d": "x"}]}]
    for name, content in (
        ("x.jsonl", "\n".join(map(json.dumps, rows))),
        ("x.json", json.dumps(rows, indent=1)),
        ("y.jsonl", "\ufeff" + json.dumps(rows)),
    ):
        assert list(read_table(written(tmp_path, content, name))) == [rows[0] | {"c": None}, rows[1]]
    many = "\n".join(json.dumps({"a": n} if n < 15_000 else {"a": n / 2, "b": "x"}) for n in range(16_000))
    table = read_table(written(tmp_path, many, "z.jsonl"))
    assert table[14_999] == {"a": 14_999.0, "b": None} and table[15_001] == {"a": 7500.5, "b": "x"}


def labelled(folder, labels, name="x.csv"):
    return written(folder, "text,label\n" + "\n".join(f"w{n},{labels[n % len(labels)]}" for n in range(60)), name)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["1", "2", "3+"], ("1", "2", "3+")),
        (["00", "0", "-0"], ("-0", "0", "00")),
        (["nan", "null", "<NA>"], ("<NA>", "nan", "null")),
        (["TRUE", "true"], ("TRUE", "true")),
    ],
)
def test_classes_are_what_was_typed(labels, names, tmp_path, tokenizer):
    path = labelled(tmp_path, labels)
    loaded = load_dataset_any(path)
    assert prepare(loaded, "text-classification", tokenizer).label_names == names
    renamed = written(tmp_path, path.read_text().replace("text,label", "text,kind"), "kind.csv")
    late = load_dataset_any(renamed)  # which column has the classes is told to `prepare` alone
    assert prepare(late, "text-classification", tokenizer, label_column="kind").label_names == names


def test_classes_that_differ_in_spaces_stay_apart_and_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_dataset_any(labelled(tmp_path, ["a", "a ", "b"]))
    assert loaded["train"].features["label"].names == ["a", "a ", "b"]
    assert "differ in spaces alone, and are told apart: 'a', 'a '" in caplog.text


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["1", "0", "", "1"], r"without a label \('', the first on line 4 of .*x\.csv"),
        (["a", "  ", "b"], "without a label.*line 3"),
        (["0.5", "1", "2"], r"x\.csv.*regression"),
        (["1e-3", ".5"], "regression"),
        (["9" * 25, "1"], "more than 18 digits"),
    ],
)
def test_labels_of_a_file_that_are_refused(labels, words, tmp_path, tokenizer):
    with pytest.raises(DataError, match=words):
        prepare(load_dataset_any(labelled(tmp_path, labels)), "text-classification", tokenizer)
    # where nobody asks for the labels, they are nobody's business
    assert len(prepare(load_dataset_any(labelled(tmp_path, labels)), "causal-lm", tokenizer).train)


def test_damaged_folders_of_save_to_disk(tmp_path):
    folder = tmp_path / "saved"
    rows = datasets.Dataset.from_dict({"text": ["some text"] * 10 + ["other"]})
    rows.save_to_disk(str(folder))
    data = folder / "data-00000-of-00001.arrow"
    for path, content in (
        (folder / "state.json", b'{"_data_files": "x"}'),
        (folder / "state.json", b'{"_data_files": [{"filename": ".."}]}'),
        (folder / "dataset_info.json", b'{"features": {"text": {"_type": "Nothing"}}}'),
        (folder / "dataset_info.json", b"[" * 100_000),
        (data, data.read_bytes()[:300]),
        (data, data.read_bytes().replace(b"some text", b"\xff\xfe\xfd text", 1)),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"Cannot read the folder .*saved"):
            load_dataset_any(folder)
        path.write_bytes(before)
    assert len(load_dataset_any(folder, test_fraction=0.5)["train"]) == 1  # without its duplicates


@pytest.mark.parametrize("seed", [-1, True, "0", 1 << 70])
def test_a_seed_out_of_range(seed, tmp_path):
    with pytest.raises(DataError, match="seed must be an integer"):
        load_dataset_any(written(tmp_path, RIGHT), seed=seed)
