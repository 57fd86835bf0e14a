"""Tables of properties: CSV, JSON, JSON lines or parquet, row by row, each row with its place in the file.

CSV is read with Python's own reader, which tells the line of each row and loses no digit of a number.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .columns import plain

_MISSING = {"", "nan", "na", "n/a", "<na>", "null", "none"}


class Row(NamedTuple):
    """A row of a table.

    Args:
        where (`str`): file and place, as an editor counts: the header of a CSV file is line 1.
        values (`dict[str, Any]`): by column; None where nothing stands.
    """

    where: str
    values: dict[str, Any]


def read_table(
    path: Path, required: Mapping[str, str] | None = None, text: Iterable[str] = (), ignore: Iterable[str] = ()
) -> Iterator[Row]:
    """Rows of a table.

    Args:
        path (`Path`): `.csv` or `.tsv` (also with `.gz`), `.json` (a list of objects), `.jsonl` or `.parquet`.
        required (`Mapping[str, str]`, *optional*): columns that must be there, and what to do if one is not.
        text (`Iterable[str]`): columns whose values are text, whatever they look like.
        ignore (`Iterable[str]`): columns to leave out; they must be there too.

    Yields:
        [`Row`]: in order.

    Raises:
        ValueError: If the file or a column is missing, or a row is damaged; file and line are named.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected a table of properties.")
    text, ignore = frozenset(text), [*ignore]
    rows, value_of = _reader(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows.")
    for name, advice in {**(required or {}), **dict.fromkeys(ignore, "mend --ignore")}.items():
        if name not in first.values:
            raise ValueError(f"{path} has no column {name!r}, it has {', '.join(first.values)}; {advice}.")
    for where, values in chain([first], rows):
        kept = {name: value for name, value in values.items() if name not in ignore}
        yield Row(where, {name: _as_text(value) if name in text else value_of(value) for name, value in kept.items()})


def _reader(path: Path) -> tuple[Iterator[Row], Callable[[Any], Any]]:
    """Rows as they stand in the file, and what makes a value of what stands in a column."""
    name = path.name.lower()
    if name.removesuffix(".gz").endswith((".csv", ".tsv")):
        return _csv_rows(path, "\t" if name.removesuffix(".gz").endswith(".tsv") else ","), _cell_value
    if name.endswith((".jsonl", ".ndjson")):
        return _json_lines(path), plain
    if name.endswith(".json"):
        return _json_entries(path), plain
    if name.endswith(".parquet"):
        return _parquet_rows(path), plain
    raise ValueError(f"{path} is no table that can be read; expected .csv, .tsv, .json, .jsonl or .parquet.")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    line = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets put a mark in front
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path)
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(f"it has {len(cells)} cells, the header has {len(header)}")
                # a column without a name is the index that pandas writes
                values = {name: cell for name, cell in zip(header, cells, strict=True) if name} if cells else {}
                if values:
                    yield Row(f"{path}, line {line}", values)
                line = reader.line_num + 1  # where the next row begins: one in quotes may have several lines
    except (csv.Error, EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}, line {max(line, 1)} cannot be read: {error}.") from error


def _check_header(header: list[str], path: Path) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} stands twice in it")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _object(f"{path}, line {number}", _parse(line, f"{path}, line {number}"))


def _json_entries(path: Path) -> Iterator[Row]:
    entries = _parse(path.read_bytes(), str(path))
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a list of objects, one a checkpoint.")
    for number, entry in enumerate(entries, start=1):
        yield _object(f"{path}, entry {number}", entry)


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error


def _object(where: str, entry: Any) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {type(entry).__name__}, expected an object with a value for each column.")
    return Row(where, entry)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}.") from error


def _as_text(value: Any) -> str | None:
    return None if value is None or not str(value).strip() else str(value).strip()


@lru_cache(maxsize=2**16)  # equal values of many rows are one object
def _cell_value(cell: str) -> Any:
    """What the text of a cell stands for: nothing, true or false, a number, or itself."""
    cell = cell.strip()
    if cell.lower() in _MISSING:
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if "_" not in cell:  # Python would take 1_000 for a number
        for kind in (int, float):
            with suppress(ValueError, OverflowError):
                return plain(kind(cell))
    return cell
