"""Where the files of a zoo are: in a folder, or in a dataset repository on the Hub, pinned to one commit."""

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from hub_scripts.arguments import require_source
from hub_scripts.hub import explain
from hub_scripts.zoos.schema import ZOO_FILE
from tokenization_sane.safetensors_sane import first_line

logger = logging.getLogger(__name__)
SIDE_FILES = [ZOO_FILE, "layouts/*", "symmetries/*"]


def open_source(source: str | Path, revision: str | None = None) -> "FolderSource | HubSource":
    """Find a zoo.

    Args:
        source (`str` or `Path`): a folder, or a dataset repository `namespace/name`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        ValueError: If there is none; the Hub's own words with what to do.
    """
    require_source(source, "the zoo")
    if Path(source).is_dir():
        return FolderSource(Path(source))
    repo_id = str(source)
    try:
        info = HfApi().dataset_info(repo_id, revision=revision, files_metadata=True)
    except (OfflineModeIsEnabled, HTTPError, OSError, ValueError) as error:
        if isinstance(error, HfHubHTTPError) or not isinstance(error, (HTTPError, OSError)):
            raise ValueError(_refused(repo_id, revision, error)) from error
        try:
            folder = snapshot_download(repo_id, repo_type="dataset", revision=revision, local_files_only=True)
        except (OSError, ValueError):
            raise ValueError(
                f"{repo_id} is no folder here, the Hub cannot be reached ({first_line(error)}), and it is not in the cache."
            ) from error
        logger.warning(
            "the Hub cannot be reached (%s); what the cache holds of %s is used", first_line(error), repo_id
        )
        return FolderSource(Path(folder))
    return HubSource(repo_id, info)


class FolderSource:
    """A zoo on this machine."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.sizes = {name: (folder / name).stat().st_size for name in names if not name.startswith(".")}

    @property
    def identity(self) -> list:
        """Changes when a file of the rows does."""
        times = {name: (self.folder / name).stat().st_mtime_ns for name in self.sizes if name.startswith("data/")}
        return [str(self.folder.resolve()), sorted((name, self.sizes[name], times[name]) for name in times)]

    def side_file(self, name: str) -> Path:
        """A file of the zoo beside its rows."""
        return self.folder / name

    def fetch(self, name: str, again: bool = False) -> Path:
        """A file to read again and again."""
        return self.folder / name

    def stream(self, name: str) -> Path:
        """A file of which parts are read."""
        return self.folder / name


class HubSource:
    """A zoo on the Hub; all files are of one commit, even if the repository changes meanwhile."""

    def __init__(self, repo_id: str, info):
        self.name, self.revision = repo_id, info.sha
        self.sizes = {file.rfilename: file.size for file in info.siblings}

    @cached_property
    def folder(self) -> Path:
        """Local copies of the small files beside the rows."""
        try:
            return Path(
                snapshot_download(
                    self.name, repo_type="dataset", revision=self.revision, allow_patterns=SIDE_FILES, max_workers=2
                )
            )
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise ValueError(_refused(self.name, self.revision, error)) from error

    @property
    def identity(self) -> list:
        """Changes when the zoo does."""
        return [self.name, self.revision]

    def side_file(self, name: str) -> Path:
        """A file of the zoo beside its rows; it may not exist."""
        return self.folder / name

    def fetch(self, name: str, again: bool = False) -> Path:
        """A file to read again and again: downloaded once, into the Hub's cache; `again` where what is there is damaged."""
        return Path(
            hf_hub_download(self.name, name, repo_type="dataset", revision=self.revision, force_download=again)
        )

    def stream(self, name: str) -> BinaryIO:
        """A file of which parts are read, each by a request of its own."""
        # the file system's own read-ahead of 5 MB would fetch what was not asked for
        return HfFileSystem().open(
            f"datasets/{self.name}@{self.revision}/{name}", "rb", block_size=2**20, cache_type="none"
        )


def data_files(sizes: dict[str, int], split: str) -> list[str]:
    """The parquet files of a split, in order; also as `Dataset.push_to_hub` names them."""
    return sorted(name for name in sizes if re.fullmatch(rf"data/{split}-[^/]*\.parquet", name))


def _refused(repo_id: str, revision: str | None, error: Exception) -> str:
    return f"{repo_id} is neither a folder nor a dataset repository that can be read: {explain(error, revision)}."
