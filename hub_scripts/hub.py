"""What commands share in meeting the Hub: errors in one sentence with what to do, and folders that go up in one commit."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tokenization_sane.safetensors_sane import first_line


def explain(error: Exception, revision: str | None = None) -> str:
    """The Hub's own words and what to do about them."""
    return f"{first_line(error)} ({_hint(error, revision)})"


def _hint(error: Exception, revision: str | None) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"there is no revision {revision!r}; leave --revision out for the newest"
    if isinstance(error, GatedRepoError):
        return "ask for access on its page on the Hub, then log in with `hf auth login`"
    if isinstance(error, (RepositoryNotFoundError, EntryNotFoundError)):
        return "check the name; if it is private, log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "log in again with `hf auth login`, or set HF_TOKEN to a token that may do this"
    if isinstance(error, HTTPError):
        return "the Hub did not answer as it should; try again later, what is done already is kept"
    return "check the name"


def publish_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload",
    ignore: Sequence[str] = (),
    replace: Sequence[str] = (),
) -> str:
    """Upload a folder in one commit, so that nobody sees half of it; large files that are there already are not sent again.

    Args:
        folder (`str` or `Path`): what to upload.
        repo_id (`str`): where it goes, `namespace/name`; made if it does not exist.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`): of a new repository.
        revision (`str`, *optional*): branch; made if it does not exist.
        message (`str`): first line of the commit.
        ignore (`Sequence[str]`): patterns of files to leave out.
        replace (`Sequence[str]`): patterns of files in the repository that go if the folder does not have them.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: If the Hub refuses; its words and what to do.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        return api.upload_folder(
            folder_path=str(folder),
            repo_id=repo_id,
            repo_type=repo_type,
            revision=revision,
            commit_message=message,
            ignore_patterns=[".*", *ignore],
            delete_patterns=list(replace) or None,
        ).commit_url
    except RuntimeError as error:  # of one of the threads that upload; the cause says more
        raise ValueError(
            f"{folder} was not published at {repo_id}: {first_line(error)} {explain(error.__cause__ or error)}; "
            "the same command goes on."
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{folder} was not published at {repo_id}: {explain(error, revision)}.") from error
