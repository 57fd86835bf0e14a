"""Plots of searches, in the manner of `plots`: from arrays to a matplotlib `Figure`; nothing is shown or saved."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from hub_scripts.evaluation.plots import RC

NAMED_MODELS = (
    10  # as many colours as are told apart; with more models each is one of a scale, and the legend is left out
)


@mpl.rc_context(RC)
def cluster_map(vectors: np.ndarray, models: Sequence[str], queries: np.ndarray, query_names: Sequence[str]) -> Figure:
    """Networks of an index on their first two principal components, coloured by model, with the queries among them.

    Args:
        vectors (`np.ndarray` of shape `(networks, features)`): standardised embeddings.
        models (`Sequence[str]`): the model that each is a checkpoint of.
        queries (`np.ndarray` of shape `(queries, features)`): standardised embeddings, at least one.
        query_names (`Sequence[str]`): what they are called.

    Returns:
        `Figure`: one panel, each network a point and each query a numbered star.
    """
    together = np.concatenate([vectors, queries])
    with np.errstate(invalid="ignore"):  # networks that are all equal have no variance to share out
        pca = PCA(min(2, *together.shape), random_state=0).fit(vectors if len(vectors) > 2 else together)
    points = np.zeros((len(together), 2))  # a second component may be missing
    points[:, : pca.n_components_] = pca.transform(together)
    shares = 100 * np.pad(np.nan_to_num(pca.explained_variance_ratio_), (0, 2 - pca.n_components_))
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    names = sorted(set(models))
    numbers = np.searchsorted(names, models)
    known, asked = points[: len(vectors)], points[len(vectors) :]
    if len(names) <= NAMED_MODELS:
        for number, name in enumerate(names):
            axes.scatter(*known[numbers == number].T, color=mpl.colormaps["tab10"](number), s=16, label=_short(name))
    else:
        axes.scatter(*known.T, c=numbers, cmap="turbo", s=9, alpha=0.85, linewidths=0)
    for number, (point, name) in enumerate(zip(asked, query_names, strict=True), start=1):
        # hollow, so that the network that it may lie on is seen
        axes.scatter(
            *point, marker="*", s=200, facecolors="none", edgecolors="black", label=f"{number}: {_short(name)}"
        )
        axes.annotate(str(number), point, xytext=(7, 5), textcoords="offset points")
    axes.set(
        title=f"{len(vectors)} networks of {len(names)} models",
        xlabel=f"component 1 ({shares[0]:.0f} % of variance)",
        ylabel=f"component 2 ({shares[1]:.0f} %)",
    )
    figure.legend(loc="outside right upper")
    return figure


def _short(name: str, length: int = 32) -> str:
    """The end of a name, which tells more than its beginning."""
    return name if len(name) <= length else f"…{name[-length:]}"
