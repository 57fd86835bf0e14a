"""Repositories on the Hugging Face Hub: one model each, or several revisions of each as its epochs.

```
repositories.txt
  # one repository a line, `@` before a branch, tag or commit
  org/model-a
  org/model-b@step1000
```
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tokenization_sane.checkpoint_sane import read_checkpoint

from .checkpoint import Checkpoint
from .columns import SPLIT_NAMES, identifier, is_number, plain
from .options import ImportOptions
from .sources import guess_format, layout_source, natural_key, read_object, require_weights
from .transformers_config import architecture_of

logger = logging.getLogger(__name__)
ALL = "all"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?(@\S+)?", re.ASCII)


class Revision(NamedTuple):
    """A branch, tag or commit of a repository, and the epoch that it stands for."""

    name: str
    epoch: int


def list_checkpoints(source: str, options: ImportOptions) -> list[Checkpoint]:
    """Checkpoints of repositories, each revision pinned to its commit.

    A repository is a model. Its epochs are `options.revisions`: the number that a revision's name ends in (`step1000`), or else its
    place in the list; where only some have a number, the others (such as main) come after the last of them. What the model card
    reports becomes properties, the configuration the architecture.

    Args:
        source (`str`): a repository `namespace/name` (with `@revision`), or a text file with one a line.
        options ([`ImportOptions`]): `revisions`, for the repositories without an `@`; `["all"]` for all branches and tags.

    Returns:
        `list[Checkpoint]`: by repository, then by epoch.

    Raises:
        ValueError: If the source is neither, or a repository cannot be read; it is named.
    """
    checkpoints: list[Checkpoint] = []
    for repo_id, names in _repositories(source, options.revisions).items():
        with options.skipping():
            for revision in _revisions(repo_id, names):
                with options.skipping():
                    checkpoints.append(_checkpoint(repo_id, revision, options.allow_pickle))
    return checkpoints


# ---------------------------------------------------------------------------------------------------- which ones
def _repositories(source: str, revisions: list[str]) -> dict[str, list[str]]:
    """Repositories and the revisions of each that are wanted; `""` is the newest of main."""
    wanted: dict[str, list[str]] = {}
    for name in _names(source):
        repo_id, _, revision = name.partition("@")
        wanted.setdefault(repo_id, []).extend([revision] if revision else revisions or [""])
    return wanted


def _names(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        other = guess_format(path)
        hint = f"; it looks like --format {other}" if other else ""
        raise ValueError(
            f"--format hub expects a repository, or a text file with one a line, {source} is a folder{hint}."
        )
    if not path.is_file():
        if not _REPOSITORY.fullmatch(source) or path.suffix == ".txt":
            raise ValueError(f"{source} is neither a text file nor the name of a repository, such as namespace/name.")
        return [source]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text file; --format hub expects one with a repository a line.") from error
    return _parse(lines, source)


def _parse(lines: list[str], source: str) -> list[str]:
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.partition("#")[0].strip()
        if not name:
            continue
        if not _REPOSITORY.fullmatch(name):
            raise ValueError(
                f"{source}, line {number}: {name!r} is no repository, expected namespace/name[@revision]."
            )
        if name in names:
            raise ValueError(f"{source}, line {number}: {name} stands in line {names[name]} already; remove one.")
        names[name] = number
    if not names:
        raise ValueError(f"{source} names no repository, expected one a line.")
    return [*names]


def _revisions(repo_id: str, names: list[str]) -> list[Revision]:
    """Revisions with their epochs, by epoch."""
    if ALL in names:
        names = _all_revisions(repo_id)
    numbers = {name: _number(name) for name in names}
    # main is what the training ended with, so it comes after the steps
    places = count(1 + max((number for number in numbers.values() if number is not None), default=-1))
    owners: dict[int, str] = {}
    for name, number in numbers.items():
        epoch = next(places) if number is None else number
        if epoch in owners:
            raise ValueError(
                f"{repo_id}: the revisions {owners[epoch]} and {name} would both be epoch {epoch}; "
                "choose among them with --revisions."
            )
        owners[epoch] = name
    return [Revision(owners[epoch], epoch) for epoch in sorted(owners)]


def _all_revisions(repo_id: str) -> list[str]:
    """Branches and tags in natural order; of several names of one commit, one, if possible one with a number."""
    with _hub(repo_id):
        refs = HfApi().list_repo_refs(repo_id)
    found = sorted([*refs.branches, *refs.tags], key=lambda ref: (_number(ref.name) is None, natural_key(ref.name)))
    by_commit: dict[str, str] = {}
    for ref in found:
        by_commit.setdefault(ref.target_commit, ref.name)
    return sorted(dict.fromkeys(by_commit.values()), key=natural_key)


def _number(name: str) -> int | None:
    """The number that a revision's name ends in; versions (v1.0) and commits have none."""
    found = re.search(r"(?<![0-9.])[0-9]+$", name)
    return int(found[0]) if found and not re.fullmatch("[0-9a-f]{40}", name) else None


# ---------------------------------------------------------------------------------------------------- what is known
def _checkpoint(repo_id: str, revision: Revision, allow_pickle: bool) -> Checkpoint:
    with _hub(f"{repo_id}@{revision.name}" if revision.name else repo_id):
        info = HfApi().model_info(repo_id, revision=revision.name or None)
    source = f"{repo_id}@{info.sha}"
    names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    require_weights(names, source, allow_pickle)
    config = _download(repo_id, "config.json", info.sha) if "config.json" in names else None
    card = _download(repo_id, "README.md", info.sha) if "README.md" in names else None
    architecture, kwargs = architecture_of(read_object(config)) if config else (None, {})
    return Checkpoint(
        model_id=repo_id,
        epoch=revision.epoch,
        where=source,
        read=partial(read_checkpoint, source, allow_pickle),
        columns=_reported(card, source) if card else {},
        architecture=architecture,
        architecture_kwargs=kwargs,
        layout_source=layout_source(source, names),
    )


def _download(repo_id: str, name: str, commit: str) -> Path:
    with _hub(f"{repo_id}@{commit}"):
        return Path(hf_hub_download(repo_id, name, revision=commit))


def _reported(card: Path, where: str) -> dict[str, float]:
    """Metrics of a model card by their columns; of several data sets, the others' name follows that of the metric."""
    try:
        results = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.eval_results or []
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        # people write cards by hand; a model is worth importing without what its card says
        logger.warning("the metrics of %s are left out, its model card is damaged: %s", where, error)
        return {}
    columns: dict[str, float] = {}
    for result in results:
        if is_number(result.metric_value):
            name = _column(result)
            name = f"{name}_{identifier(str(result.dataset_name))}" if name in columns else name
            columns.setdefault(name, plain(result.metric_value))
    return columns


def _column(result: EvalResult) -> str:
    metric = identifier(str(result.metric_type)).lower()
    if metric not in ("accuracy", "loss"):
        return metric
    split = re.match("[a-z]*", str(result.dataset_split).lower())[0]  # "validation[:10%]"
    return f"{SPLIT_NAMES.get(split, 'test')}_{metric}"


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Around requests about a repository: what the Hub answers becomes one sentence that names it."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} does not exist: the repository has no such branch, tag or commit.") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated; ask for access on its page on the Hub, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is no model repository that can be read; check the name, and if it is private, log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be read from the Hub: {reason}") from error
