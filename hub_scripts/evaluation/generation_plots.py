"""Plots of generated networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from hub_scripts.evaluation.plots import RC, label_of, style_of


@mpl.rc_context(RC)
def curves(points: Mapping[str, Sequence[Mapping[str, float]]], sets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean accuracy against mean distance to the nearest training checkpoint, a line for each method as it goes further.

    Args:
        points (`Mapping`): method -> points with `nearest_train_distance` and `accuracy_mean`.
        sets (`Mapping`): what `results.json` holds under `sample`: anchors and unseen networks are marked.

    Returns:
        `Figure`: the higher a line runs, the better its method generates; up and to the right is good and new.
    """
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.subplots()
    for index, (name, line) in enumerate(points.items()):
        ordered = sorted((p["nearest_train_distance"], p["accuracy_mean"]) for p in line)
        colour, marker = style_of(name, index)
        axes.plot(*zip(*ordered, strict=True), color=colour, marker=marker, label=label_of(name))
    for index, name in enumerate(("anchors", "unseen")):
        if name in sets:
            colour, marker = style_of(name, index)
            place = (sets[name]["nearest_train_distance"], sets[name]["accuracy_mean"])
            axes.plot(
                *place, color=colour, marker=marker, markersize=12, linestyle="none", label=label_of(name), zorder=3
            )
    axes.set(
        xlabel="mean L2 distance to the nearest training checkpoint (normalised)", ylabel="mean test accuracy (0 to 1)"
    )
    figure.legend(loc="outside right center")
    return figure
