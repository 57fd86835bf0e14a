"""Plots of fine-tuning."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from hub_scripts.evaluation.learning_curves import LearningCurve
from hub_scripts.evaluation.plots import RC, STYLES, label_of, style_of

MARKERS = 12  # on a line at most


@mpl.rc_context(RC)
def accuracy_curves(curves: Mapping[str, LearningCurve], steps_per_epoch: int) -> Figure:
    """Accuracy while fine-tuning, mean over networks and seeds with its 95 % interval.

    Args:
        curves (`Mapping[str, LearningCurve]`): start -> curve.
        steps_per_epoch (`int`): optimizer steps in an epoch.

    Returns:
        `Figure`: a line with a band for each start.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, curve), (colour, marker) in zip(curves.items(), _styles(curves), strict=True):
        epochs = curve.steps / steps_per_epoch
        seeds, _, networks = curve.accuracy.shape
        label = f"{label_of(name)} (n = {networks}{f' x {seeds}' if seeds > 1 else ''})"
        axes.fill_between(epochs, *curve.interval.T, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            epochs, curve.mean, color=colour, marker=marker, markersize=9 if marker == "*" else 5,
            markevery=max(1, len(epochs) // MARKERS), label=label,
        )  # fmt: skip
    axes.set(xlabel="epochs of fine-tuning", ylabel="test accuracy (0 to 1)")
    axes.set_ylim(top=min(1.02, axes.get_ylim()[1]))
    figure.legend(loc="outside right center", title="mean, 95 % interval")
    return figure


@mpl.rc_context(RC)
def steps_to_reach(curves: Mapping[str, LearningCurve], levels: Sequence[float]) -> Figure:
    """Optimizer steps until the mean accuracy reaches a level, with 95 % intervals.

    Args:
        curves (`Mapping[str, LearningCurve]`): start -> curve.
        levels (`Sequence[float]`): accuracies, 0 to 1.

    Returns:
        `Figure`: a panel for each level, a row for each start.
    """
    height = 1.0 + 0.3 * len(curves)
    figure = Figure(figsize=(max(4.2, 1.6 + 2.4 * len(levels)), height), layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    last = max(int(curve.steps[-1]) for curve in curves.values())
    for axes, level in zip(panels, levels, strict=True):
        for place, (curve, (colour, marker)) in enumerate(zip(curves.values(), _styles(curves), strict=True)):
            step, (low, high) = curve.steps_to_reach(level), curve.steps_interval(level)
            if low is not None:
                axes.hlines(-place, low, last if high is None else high, color=colour, linewidth=1.5, alpha=0.6)
            if step is None:
                axes.text(last, -place, "never", ha="right", va="center", fontsize=9, color="#666666")
            else:
                axes.plot(step, -place, marker, color=colour, markersize=9 if marker == "*" else 6)
        axes.set(title=f"accuracy {level:g}", xlabel="optimizer steps", xlim=(-0.03 * last, 1.06 * last))
    panels[0].set_yticks(-np.arange(len(curves)), [label_of(name) for name in curves])
    panels[0].set_ylim(-len(curves) + 0.4, 0.6)
    return figure


def _styles(names: Mapping[str, LearningCurve]) -> list[tuple[str, str]]:
    """Colours and markers; sets without a style of their own are counted, so that neighbours differ."""
    others = [name for name in names if name not in STYLES]
    return [style_of(name, others.index(name) if name in others else 0) for name in names]
