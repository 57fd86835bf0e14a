"""What a user says about a foreign zoo, and what is left out of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ImportOptions:
    """Options of all importers; each uses those that its format has a meaning for.

    Args:
        properties (`str`, *optional*): table of properties (`folder`).
        path_column (`str`): its column with the path of each checkpoint (`folder`).
        model_column (`str`): its column with the name of each network (`folder`).
        epoch_column (`str`): its column with the epoch (`folder`).
        split_column (`str`): its column with the split; it may be missing (`folder`).
        hparam_columns (`list[str]`): columns that are hyper-parameters and become `hparams_<name>`; those that are called so
            already need not be named (`folder`, `unterthiner`).
        ignore_columns (`list[str]`): columns to leave out, by their name in the table (`folder`, `unterthiner`).
        revisions (`list[str]`): branches, tags or commits that are the epochs of each repository; `["all"]` for all branches
            and tags (`hub`).
        allow_pickle (`bool`): True opens pickles too, with `weights_only=True`.
        on_error (`str`): `"refuse"` raises the first fault of a checkpoint, `"skip"` leaves such checkpoints out.
        skipped (`list[str]`): why checkpoints were left out, a line each.
    """

    properties: str | None = None
    path_column: str = "path"
    model_column: str = "model_id"
    epoch_column: str = "epoch"
    split_column: str = "split"
    hparam_columns: list[str] = field(default_factory=list)
    ignore_columns: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    allow_pickle: bool = False
    on_error: Literal["refuse", "skip"] = "refuse"
    skipped: list[str] = field(default_factory=list)

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Around the work for one checkpoint: its `ValueError` is passed on, or kept as a reason and the work left out."""
        try:
            yield
        except ValueError as error:
            if self.on_error == "refuse":
                raise
            self.skipped.append(str(error))
