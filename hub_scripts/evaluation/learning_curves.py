"""Accuracy of sets of networks while they train: means, intervals, and the steps until an accuracy is reached."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DRAWS = 1000  # of the bootstrap
LEVEL = 0.95


@dataclass(frozen=True)
class LearningCurve:
    """A set of networks, trained several times.

    Args:
        steps (`np.ndarray` of shape `(points,)`): optimizer steps when the accuracy was measured; 0 is before training.
        accuracy (`np.ndarray` of shape `(seeds, points, networks)`): 0 to 1.
    """

    steps: np.ndarray
    accuracy: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over networks and seeds, `(points,)`."""
        return self.accuracy.mean((0, 2), dtype=np.float64)

    @property
    def median(self) -> np.ndarray:
        """Over networks and seeds, `(points,)`."""
        return np.median(self.accuracy, (0, 2))

    @property
    def std(self) -> np.ndarray:
        """Over networks and seeds, `(points,)`."""
        return self.accuracy.std((0, 2), dtype=np.float64)

    @cached_property
    def drawn_means(self) -> np.ndarray:
        """Means `(draws, points)` as they could have been: networks and seeds are drawn anew, with replacement, each on its own.

        Runs are not drawn one by one: those of one network, or of one order of images, are more alike than others.
        """
        random, (seeds, _, networks) = np.random.default_rng(0), self.accuracy.shape
        weights = [random.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in (seeds, networks)]
        return np.einsum("ds,spn,dn->dp", weights[0], self.accuracy, weights[1], optimize=True)

    @property
    def interval(self) -> np.ndarray:
        """95 % interval of the mean `(points, 2)`; NaN where there is one run only, which says nothing about others."""
        if self.accuracy[:, 0].size == 1:
            return np.full((len(self.steps), 2), np.nan)
        return np.quantile(self.drawn_means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T

    def steps_to_reach(self, accuracy: float) -> int | None:
        """The first measured step at which the mean is at least so high; None if it never is."""
        return self._plain(self._first_steps(self.mean[None], accuracy)[0])

    def median_steps_to_reach(self, accuracy: float) -> int | None:
        """The same for the median network."""
        return self._plain(self._first_steps(self.median[None], accuracy)[0])

    def steps_interval(self, accuracy: float) -> tuple[int | None, int | None]:
        """95 % interval of [`~LearningCurve.steps_to_reach`]; None at an end for never, and at both if there is one run only."""
        if self.accuracy[:, 0].size == 1:
            return None, None
        found = np.sort(self._first_steps(self.drawn_means, accuracy))
        ends = [round(share * (DRAWS - 1)) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
        return self._plain(found[ends[0]]), self._plain(found[ends[1]])

    def _first_steps(self, curves: np.ndarray, accuracy: float) -> np.ndarray:
        """`(curves,)`, infinite for never, of curves `(curves, points)`."""
        reached = curves >= accuracy
        return np.where(reached.any(1), self.steps[reached.argmax(1)], np.inf)

    @staticmethod
    def _plain(step: float) -> int | None:
        return int(step) if np.isfinite(step) else None
