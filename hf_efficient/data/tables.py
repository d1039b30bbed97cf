"""The rows of a data file as its author sees them in an editor: nothing is guessed, and no row shifts.

    rows = read_table("reviews.csv")         # a `datasets.Dataset` in memory; every fault is a DataError with the file
    place_of("reviews.csv", 3)               # "line 5": where its fourth row begins

A file is opened under exactly the name that it has, never searched by a pattern. CSV and TSV hold text and nothing
else: `NA`, `01` and `true` are what was typed, an empty field is an empty text. JSON and Parquet have types.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..errors import DataError, did_you_mean, shown
from ..io.json import first_twice, parse_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

MAX_BYTES = 1 << 32  # of a file, and of the rows of a Parquet file once they are decoded
MAX_UNPACKED = 1 << 30  # bytes of a compressed text file, which is unpacked in memory
MAX_TEXT = 1 << 26  # characters of one value
MAX_COLUMNS = 10_000
MAX_ROWS = 100_000_000
ROWS_AT_ONCE = 10_000
CHARACTERS_AT_ONCE = 1 << 26

UNPACKERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
ARCHIVES = {b"PK\x03\x04": "a zip archive or a workbook", b"(\xb5/\xfd": "a zstd file", b"7z\xbc\xaf": "a 7z archive"}
QUOTES = (
    "A field that holds the separator, a line break or a double quote stands in double quotes, and a double quote in "
    'it is written twice: "It was ""good"", but slow".'
)


def read_table(path: str | os.PathLike) -> Dataset:
    """All rows of a .csv, .tsv, .json, .jsonl, .parquet or .txt file, in their order.

    A .txt file has one document per line, in the column `text`; blank lines are left out. A .json or .jsonl file is
    one object per line, or a list of objects. Text is UTF-8, and may be compressed (gzip, bz2, xz).

    Raises:
        DataError: no such file, another ending, no rows; a line that has more or fewer fields than the header, a
            column or key given twice, a value of another type than those before it; more than 4 GiB (1 GiB once
            unpacked), 10,000 columns or 64 Mi characters in one value. It names the file, and the line.
    """
    name = os.fspath(path)
    ending = os.path.splitext(name)[1]
    if not os.path.isfile(name):
        raise missing_file(name)
    if ending not in FORMATS:
        raise DataError(f"Cannot tell what {name!r} holds: its ending must be one of {', '.join(FORMATS)}.")
    if not os.path.getsize(name):
        raise DataError(f"The data file {name!r} is empty.")
    try:
        import datasets

        with open(name, "rb") as file:
            table = FORMATS[ending].read(file)
        if doubled := first_twice(table.column_names):
            raise DataError(f"it has two columns called {doubled!r}. Give each a name of its own.")
        if not table.num_rows:
            raise DataError("it has no rows, where one row or more is needed.")
        rows = datasets.Dataset(table)
        rows.data.validate(full=True)
        return rows
    except DataError as error:
        raise DataError(f"Cannot read {name!r} as {ending}: {error}") from error
    except Exception as error:  # what the readers of others raise at a damaged file is up to them
        raise DataError(
            f"Cannot read {name!r} as {ending}: {str(error)[:500] or type(error).__name__}. Mend it, or take it "
            "from a good copy."
        ) from error


def place_of(path: str | os.PathLike, row: int) -> str:
    """Where a person finds the row, counted from 0: "line 5", "object 4" of a list, "row 4" of what has no lines."""
    places = FORMATS[os.path.splitext(os.fspath(path))[1]].places
    if places is not None:
        with open(path, "rb") as file:
            return next((place for index, place in enumerate(places(file)) if index == row), f"row {row + 1}")
    return f"row {row + 1}"


def missing_file(path: str) -> DataError:
    """The error for a data file that does not exist: its nearest neighbours in the folder and the endings we read."""
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return DataError(f"No such data file {path!r}: the folder {folder!r} does not exist.")
    hint = did_you_mean(name, files_in(folder or "."))
    return DataError(f"No such data file {path!r}.{hint} Files are read by ending: {', '.join(FORMATS)}.")


def files_in(folder: str) -> list[str]:
    """Sorted names; none where the folder cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read_csv(file: IO[bytes], separator: str) -> pa.Table:
    records = _records(file, separator)
    header = [name or f"Unnamed: {place}" for place, name in enumerate(next(records, (0, []))[1])]
    if any("\0" in name for name in header):
        raise DataError("its header has characters of value 0, as UTF-16 has. Save it as UTF-8.")
    if len(header) > MAX_COLUMNS:
        raise DataError(f"its header has {len(header):,} columns, at most {MAX_COLUMNS:,} are read.")
    if doubled := first_twice(header):
        raise DataError(f"its header has the column {doubled!r} twice. Give each a name of its own.")

    def checked() -> Iterator[list[str]]:
        for line, fields in records:
            if len(fields) != len(header):
                raise DataError(f"line {line} has {len(fields)} fields, the header {len(header)}. {QUOTES}")
            yield fields

    return _table_of_texts(header, checked())


def _records(file: IO[bytes], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record begins, and its fields; the header is the first one, blank lines are left out."""
    csv.field_size_limit(MAX_TEXT)  # of the whole process, and 128 KiB by default: too little for a book
    reader = csv.reader(_lines(file, ""), delimiter=separator, strict=True)
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fault = "a double quote is opened and never closed" if "end of data" in str(error) else str(error)
            raise DataError(f"line {line}: {fault}. {QUOTES}") from error
        if fields is None:
            return
        if fields and (len(fields) > 1 or width == 1 or fields[0].strip()):
            width = width or len(fields)
            yield line, fields


def _documents(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(_lines(file, None), 1):
        if len(text) > MAX_TEXT:
            raise DataError(f"line {line} has {len(text):,} characters, at most {MAX_TEXT:,} are read. Split it.")
        if text.strip():
            yield line, text.rstrip("\n")


def _table_of_texts(names: list[str], records: Iterable[list[str]]) -> pa.Table:
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in names])
    batches, pending, characters = [], [], 0

    def flush() -> None:
        batches.append(
            pa.record_batch([pa.array(column, pa.string()) for column in zip(*pending, strict=True)], schema=schema)
        )
        pending.clear()

    for fields in records:
        pending.append(fields)
        characters += sum(map(len, fields))
        if len(pending) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            flush()
            characters = 0
    if pending:
        flush()
    return pa.Table.from_batches(batches, schema=schema)


def _read_json(file: IO[bytes]) -> pa.Table:
    """Each value must be of the kind of those before it in its column; where a row lacks a key it holds nothing."""
    import pyarrow as pa

    kinds: dict[str, tuple[str, str]] = {}  # the kind of the values of each column, and the place that decided it
    tables, pending = [], []

    def flush() -> None:
        columns = {}
        for name in kinds:
            try:
                columns[name] = pa.array([row.get(name) for row in pending])
            except (pa.ArrowException, OverflowError) as error:
                raise DataError(f"the values of {name!r} do not fit into one column: {error}.") from error
        tables.append(pa.table(columns))
        pending.clear()

    for place, row in _objects(file):
        for name, value in row.items():
            kind = KINDS.get(type(value))
            known, first = kinds.setdefault(name, (kind or "", place))
            if kind is not None and kind != known:
                if known:
                    raise DataError(
                        f"{place} has {kind} in the column {name!r} ({shown(value)}), {first} {known}. Write "
                        "all of them alike."
                    )
                kinds[name] = (kind, place)
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise DataError(f"{place} has a text of more than {MAX_TEXT:,} characters. Split it.")
        if len(kinds) > MAX_COLUMNS:
            raise DataError(f"it has more than {MAX_COLUMNS:,} different keys.")
        pending.append(row)
        if len(pending) == ROWS_AT_ONCE:
            flush()
    if pending:
        flush()
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


def _objects(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object, and its place: its line or, in a list of objects, which of them it is."""
    lines = enumerate(_lines(file, None), 1)
    number, start = next(((number, text) for number, text in lines if text.strip()), (1, ""))
    values: Iterable[tuple[str, Any]]
    if not start.strip():
        values = ()
    elif start.lstrip()[0] == "[" or start.rstrip()[-1] != "}":  # one value that goes over several lines
        text = "\n" * (number - 1) + start + "".join(text for _, text in lines)
        try:
            whole = parse_json(text, unique_keys=True)
        except ValueError as error:
            raise DataError(f"{error}.") from error
        values = (
            (f"object {index}", value) for index, value in enumerate(whole if isinstance(whole, list) else [whole], 1)
        )
    else:
        both = itertools.chain([(number, start)], lines)
        values = ((f"line {number}", _json_line(number, text)) for number, text in both if text.strip())
    for place, value in values:
        if not isinstance(value, dict):
            raise DataError(f'{place} is {shown(value)}, where an object such as {{"text": "good"}} is needed.')
        yield place, value


def _json_line(line: int, text: str) -> Any:
    try:
        return parse_json(text, unique_keys=True)
    except ValueError as error:
        raise DataError(f"line {line} is not JSON: {error}.") from error


def _read_parquet(file: IO[bytes]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet

    stored = pa.parquet.ParquetFile(file)
    if stored.metadata.num_rows > MAX_ROWS or stored.metadata.num_columns > MAX_COLUMNS:
        raise DataError(
            f"it has {stored.metadata.num_rows:,} rows and {stored.metadata.num_columns:,} columns, at most "
            f"{MAX_ROWS:,} and {MAX_COLUMNS:,} are read."
        )
    batches, size = [], 0
    for batch in stored.iter_batches(batch_size=1000):  # a small file may hold far more than its size
        size += batch.nbytes
        if size > MAX_BYTES:
            raise DataError(f"its rows have more than {MAX_BYTES:,} bytes.")
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=stored.schema_arrow)


def _lines(file: IO[bytes], newline: str | None) -> Iterator[str]:
    """The lines of UTF-8 text with their ends (a plain newline where `newline` is None), unpacked if need be."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise DataError(f"it has more than {MAX_BYTES:,} bytes. Split it, or give Parquet.")
    start = file.read(8)
    file.seek(0)
    if kind := next((kind for mark, kind in ARCHIVES.items() if start.startswith(mark)), None):
        raise DataError(f"it is {kind}. Unpack it, or save it as text.")
    unpack = next((unpack for mark, unpack in UNPACKERS.items() if start.startswith(mark)), None)
    if unpack is not None:
        content = unpack(file).read(MAX_UNPACKED + 1)
        if len(content) > MAX_UNPACKED:
            raise DataError(f"it has more than {MAX_UNPACKED:,} bytes once unpacked. Unpack and split it.")
        file = io.BytesIO(content)
    text = io.TextIOWrapper(file, "utf-8-sig", newline=newline)
    try:
        yield from text
    except UnicodeDecodeError as error:
        file.seek(0)
        for line, raw in enumerate(file, 1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as broken:
                byte = raw[broken.start]
                raise DataError(f"line {line} is not UTF-8 (byte {byte:#04x}). Save it as UTF-8.") from error
        raise
    finally:
        if not file.closed:  # by whoever opened it, when there was an error
            text.detach()  # else the wrapper would close it


class Format(NamedTuple):
    """`read` gives the table, `places` where each of its rows begins."""

    read: Callable[[IO[bytes]], pa.Table]
    places: Callable[[IO[bytes]], Iterator[str]] | None


def _csv(separator: str) -> Format:
    def places(file: IO[bytes]) -> Iterator[str]:
        return (f"line {line}" for line, _ in itertools.islice(_records(file, separator), 1, None))

    return Format(partial(_read_csv, separator=separator), places)


_JSON = Format(_read_json, lambda file: (place for place, _ in _objects(file)))
FORMATS: dict[str, Format] = {  # by the ending of the file's name
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".json": _JSON,
    ".jsonl": _JSON,
    ".parquet": Format(_read_parquet, None),
    ".txt": Format(
        lambda file: _table_of_texts(["text"], ([text] for _, text in _documents(file))),
        lambda file: (f"line {line}" for line, _ in _documents(file)),
    ),
}
