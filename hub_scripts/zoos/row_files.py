"""The parquet files of a split, in a folder or on the Hub: small columns at once, weights a row group at a time.

`datasets.load_dataset` reads the same files; this reads them without a second copy in its cache, and without the weights where
only properties are asked for.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HTTPError

WEIGHTS = "weights"  # the one large column


class RowFiles:
    """Rows in the order of the files.

    Args:
        files (`Sequence[str]`): names, in order.
        stream (`Callable[[str], BinaryIO | Path]`): opens a file to read parts of it.
        fetch (`Callable[[str], BinaryIO | Path]`): opens a file to read it again and again: a file here, downloaded if need be.
    """

    def __init__(
        self,
        files: Sequence[str],
        stream: Callable[[str], BinaryIO | Path],
        fetch: Callable[[str], BinaryIO | Path],
    ):
        self.files, self._stream, self._fetch = list(files), stream, fetch
        self._last: tuple[tuple[int, int], pa.ChunkedArray] | None = None  # a row group's weights
        self._open: dict[int, pq.ParquetFile] = {}

    @cached_property
    def _footers(self) -> list[pq.FileMetaData]:
        footers = []
        for name in self.files:
            with _naming(name), self._parquet(name, self._stream) as file:
                footers.append(file.metadata)
        return footers

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first row of each file, and at the end the number of all rows."""
        starts = [0]
        for footer in self._footers:
            starts.append(starts[-1] + footer.num_rows)
        return starts

    def __len__(self) -> int:
        return self.starts[-1]

    def table(self) -> pa.Table:
        """All columns but the weights, in memory.

        Raises:
            ValueError: If the files do not have the same columns; the first that differs is named.
        """
        tables = []
        for name in self.files:
            with _naming(name), self._parquet(name, self._stream) as file:
                tables.append(file.read(columns=[c for c in file.schema_arrow.names if c != WEIGHTS]))
        for name, table in zip(self.files, tables, strict=True):
            for column in tables[0].schema:
                if column.name not in table.schema.names:
                    raise ValueError(f"{name} has no column {column.name!r}, which {self.files[0]} has.")
                found = table.schema.field(column.name).type
                if found != column.type:
                    raise ValueError(
                        f"column {column.name!r} is {found} in {name} and {column.type} in {self.files[0]}; "
                        "a column has one type in all files."
                    )
        return pa.concat_tables(table.select(tables[0].schema.names) for table in tables)

    def weights(self, row: int) -> bytes | None:
        """The weights of one row; neighbouring rows are read together and kept until another group is asked for."""
        number = bisect_right(self.starts, row) - 1
        footer, place, group = self._footers[number], row - self.starts[number], 0
        while place >= footer.row_group(group).num_rows:
            place -= footer.row_group(group).num_rows
            group += 1
        if self._last is None or self._last[0] != (number, group):
            with _naming(self.files[number]):
                if number not in self._open:
                    self._open[number] = self._parquet(self.files[number], self._fetch)
                column = self._open[number].read_row_group(group, columns=[WEIGHTS]).column(0)
            self._last = (number, group), column
        return self._last[1][place].as_py()

    def read(self, number: int) -> Iterator[tuple[int, bytes | None]]:
        """Rows of one file in order, as they come in: `(row, weights)`."""
        row = self.starts[number]
        name = self.files[number]
        with _naming(name):
            file = self._parquet(name, self._stream)
        with file:
            for group in range(file.num_row_groups):
                with _naming(name):
                    column = file.read_row_group(group, columns=[WEIGHTS]).column(0)
                for value in column:
                    yield row, value.as_py()
                    row += 1

    def _parquet(self, name: str, opened: Callable[[str], Any]) -> pq.ParquetFile:
        source = opened(name)
        # whole column chunks of a group in one request, and nothing else
        return pq.ParquetFile(source, memory_map=isinstance(source, Path), pre_buffer=not isinstance(source, Path))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_last": None}  # open files do not go to other processes


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What Arrow says of a damaged file does not say which file it is."""
    try:
        yield
    except HTTPError:  # of the Hub, which names the file
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is damaged or no parquet file: {str(error).strip()}") from error
