"""Writes a zoo a row at a time; memory holds one row group of each split."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Value

from hub_scripts.outputs import write_json, write_text
from hub_scripts.zoos.cards import zoo_card
from hub_scripts.zoos.schema import LINEAGE_FILE, ZOO_FILE, ZOO_FORMAT, checksum, features, weights_to_bytes
from hub_scripts.zoos.tasks import SPLITS
from tokenization_sane import CheckpointLayout, SymmetrySpec

EMBED_LIMIT = 5_000_000  # bytes; larger weights get files of their own, which are fetched one by one
SHARDS = 8  # of a split that is not tiny: so many workers or processes can share it
SMALLEST_SHARD = 1_000_000  # bytes
LARGEST_SHARD = (
    64_000_000  # `load_dataset(..., streaming=True)` reads ahead to the end of a file, whatever is asked for
)
BYTES_PER_GROUP = 4_000_000  # other readers take whole row groups


class ZooWriter:
    """Writes rows into a folder that becomes a zoo with [`~ZooWriter.finish`].

    Args:
        folder (`Path`): a new folder.
        columns (`Mapping[str, Value]`): types of properties and hyper-parameters.
        num_rows (`Mapping[str, int]`): rows to come, by split.
        embed_limit (`int`): largest weights, in bytes, that stand in the row itself.
    """

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, Value],
        num_rows: Mapping[str, int],
        embed_limit: int = EMBED_LIMIT,
    ):
        self.folder, self.embed_limit = folder, embed_limit
        self.features = features(columns)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        self._layouts: dict[str, CheckpointLayout] = {}
        self._splits = {
            split: _Shards(folder / "data", split, self.features.arrow_schema, num_rows[split])
            for split in SPLITS
            if num_rows.get(split)
        }

    def add_layout(self, layout: CheckpointLayout, spec: SymmetrySpec | None = None) -> None:
        """Write what stands where in checkpoints of a kind, and which symmetries they have, if that is known."""
        self._layouts[layout.fingerprint] = layout
        write_json(self.folder / "layouts" / f"{layout.fingerprint}.json", layout.to_dict())
        if spec is not None:
            write_json(self.folder / "symmetries" / f"{layout.fingerprint}.json", json.loads(spec.to_json()))

    def add(self, split: str, row: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> str:
        """Write one checkpoint; gives the checksum of its weights.

        Args:
            split (`str`): where the model stands with all its checkpoints.
            row (`Mapping[str, Any]`): columns, with a `layout_id` that [`~ZooWriter.add_layout`] knows.
            state_dict (`Mapping[str, torch.Tensor]`): the weights.
        """
        content = weights_to_bytes(state_dict, self._layouts[row["layout_id"]].ties)
        shards = self._splits[split]
        row = {
            **dict.fromkeys(self.features),
            **row,
            "split": split,
            "weights_size": len(content),
            "weights_sha256": checksum(content),
        }
        if len(content) <= self.embed_limit:
            row["weights"] = content
        else:
            row["weights_file"] = f"weights/{split}/{shards.num_rows:06d}.safetensors"
            (self.folder / "weights" / split).mkdir(parents=True, exist_ok=True)
            (self.folder / row["weights_file"]).write_bytes(content)
        shards.add(row, len(row["weights"] or b""))
        return row["weights_sha256"]

    def finish(self, name: str, info: Mapping[str, Any], lineage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the rest: last rows, `zoo.json` and the card; gives what `zoo.json` holds.

        Args:
            name (`str`): title of the card.
            info (`Mapping[str, Any]`): what is known beyond the rows: task, licence, arguments.
            lineage (`Mapping[str, Any]`, *optional*): which networks are nearly equal, see [`Lineage`].
        """
        files = {split: shards.close() for split, shards in self._splits.items()}
        info = {"format": ZOO_FORMAT, **info, "files": {k: v for names in files.values() for k, v in names.items()}}
        write_json(self.folder / ZOO_FILE, info)
        if lineage is not None:
            write_json(self.folder / LINEAGE_FILE, lineage)
        columns = [column for column in self.features if column not in ("weights", "alignment_permutations")]
        tables = {
            split: pa.concat_tables(pq.read_table(self.folder / file, columns=columns) for file in names)
            for split, names in files.items()
        }
        write_text(self.folder / "README.md", zoo_card(name, tables, self.features, info, lineage))
        return info


class _Shards:
    """The parquet files of one split."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, expected: int):
        self.folder, self.split, self.schema = folder, split, schema
        self.rows_per_shard = -(-expected // SHARDS)
        self.num_rows = 0
        self._files: list[tuple[Path, _HashedFile]] = []
        self._writer: pq.ParquetWriter | None = None
        self._group: list[dict[str, Any]] = []
        self._rows = self._bytes = self._group_bytes = 0  # of the file, and of the row group to come

    def add(self, row: dict[str, Any], size: int) -> None:
        """Add a row whose weights take so many bytes."""
        is_enough = self._rows >= self.rows_per_shard and self._bytes >= SMALLEST_SHARD
        if is_enough or (self._rows and self._bytes + size > LARGEST_SHARD):
            self._end_file()
        if self._group and self._group_bytes + size > BYTES_PER_GROUP:
            self._end_group()
        self._group.append(row)
        self.num_rows += 1
        self._rows += 1
        self._bytes += size
        self._group_bytes += size

    def _end_group(self) -> None:
        if self._writer is None:
            path = self.folder / f"{self.split}-{len(self._files):05d}.parquet"
            self._files.append((path, _HashedFile(path)))
            # weights are noise to a compressor, and their smallest and largest bytes say nothing
            others = [name for name in self.schema.names if name != "weights"]
            self._writer = pq.ParquetWriter(
                self._files[-1][1],
                self.schema,
                use_dictionary=["model_id", "split", "layout_id", "architecture", "architecture_kwargs"],
                compression={name: "none" if name == "weights" else "snappy" for name in self.schema.names},
                write_statistics=others,
            )
        self._writer.write_table(pa.Table.from_pylist(self._group, schema=self.schema))
        self._group, self._group_bytes = [], 0

    def _end_file(self) -> None:
        self._end_group()
        self._writer.close()
        self._files[-1][1].close()
        self._writer, self._rows, self._bytes = None, 0, 0

    def close(self) -> dict[str, dict[str, Any]]:
        """End the last file and give all of them their names; by name, rows and checksum of each."""
        if self._group:
            self._end_file()
        found = {}
        for number, (path, file) in enumerate(self._files):
            name = f"{self.split}-{number:05d}-of-{len(self._files):05d}.parquet"
            path = path.rename(self.folder / name)
            found[f"data/{name}"] = {"rows": pq.read_metadata(path).num_rows, "sha256": file.digest.hexdigest()}
        return found


class _HashedFile(io.FileIO):
    """A file whose checksum is known when it is written, so that it need not be read for that."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write all of the data."""
        self.digest.update(data)
        written = super().write(data)
        while written < len(data):  # a call may take less than it is given, for instance above 2 GB
            written += super().write(memoryview(data)[written:])
        return written
