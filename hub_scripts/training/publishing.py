"""Publishes a run's model on the Hub: after each checkpoint in the background, and when it is finished."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hub_scripts.hub import publish_folder

logger = logging.getLogger(__name__)
NOT_PUBLISHED = ("step_*/*", "trackers/*")


class Publisher:
    """Sends models to one repository, one at a time, while training goes on.

    Args:
        repo_id (`str`): where they go, `namespace/name`.
        private (`bool`): of a new repository.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self._thread = ThreadPoolExecutor(1)
        self._sending: Future | None = None

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Publish the model as it is, in the background; left out while the one before is still on its way.

        Args:
            step (`int`): for the message.
            write (`Callable`): writes the model into a folder.
        """
        if self._sending is not None and not self._sending.done():
            return
        folder = Path(tempfile.mkdtemp(prefix="sane-publish-"))
        try:
            write(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._sending = self._thread.submit(self._send, folder, step)

    def _send(self, folder: Path, step: int) -> None:
        try:
            publish_folder(folder, self.repo_id, private=self.private, message=f"SANE, training at step {step}")
        except ValueError as error:
            logger.warning("step %d: %s Training goes on.", step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, folder: Path) -> str:
        """Publish the finished model and wait for it; gives the address of the commit.

        Raises:
            ValueError: If the Hub refuses.
        """
        self._thread.shutdown()
        return publish_folder(folder, self.repo_id, private=self.private, message="Upload SANE", ignore=NOT_PUBLISHED)
