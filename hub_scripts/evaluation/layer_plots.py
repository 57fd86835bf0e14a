"""Plots of layers, one function each, from arrays to a matplotlib `Figure`, in the style of `plots`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hub_scripts.evaluation.plots import RC

MOST_BARS = 60
MOST_NAMES = 12  # layers that a legend names; more are told by their depth
LINE_STYLES = ("-", "--", ":", "-.")
MARKED, UNMARKED = "#D55E00", "#0072B2"


@mpl.rc_context(RC)
def relative_changes(names: Sequence[str], changes: Sequence[float], marked: Sequence[bool]) -> Figure:
    """How much each tensor changed, in the checkpoint's order from top to bottom.

    Args:
        names (`Sequence[str]`): tensors; of more than `MOST_BARS`, those that changed most are shown.
        changes (`Sequence[float]`): norm of the change divided by the norm before.
        marked (`Sequence[bool]`): tensors in another colour.

    Returns:
        `Figure`: a bar for each tensor.
    """
    shown = np.sort(np.argsort(-np.asarray(changes, np.float64), kind="stable")[:MOST_BARS])
    figure = Figure(figsize=(7.2, 1.1 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = [MARKED if marked[index] else UNMARKED for index in shown]
    axes.barh(np.arange(len(shown)), [changes[index] for index in shown], color=colours)
    axes.set_yticks(np.arange(len(shown)), [names[index] for index in shown], fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set(xlabel="relative change ||B - A|| / ||A||", xlim=(0, None))
    if len(shown) < len(names):
        axes.set_title(f"the {len(shown)} of {len(names)} tensors that changed most")
    return figure


@mpl.rc_context(RC)
def over_epochs(epochs: np.ndarray, values: Mapping[str, np.ndarray], what: str, log: bool = False) -> Figure:
    """A figure of each layer over the epochs, coloured by depth.

    Args:
        epochs (`np.ndarray` of shape `(epochs,)`): rising.
        values (`Mapping[str, np.ndarray]`): layer -> means over the checkpoints, `(epochs,)`; the first layer first.
        what (`str`): label of the values.
        log (`bool`): True draws a logarithmic axis.

    Returns:
        `Figure`: a line for each layer.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"]
    last = max(1, len(values) - 1)
    for index, (name, line) in enumerate(values.items()):
        style = LINE_STYLES[index % len(LINE_STYLES)] if len(values) <= MOST_NAMES else "-"
        axes.plot(
            epochs, line, linestyle=style, marker="o", markersize=3.5, color=colours(0.9 * index / last), label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epochs trained", ylabel=what)
    drawn = np.concatenate([np.asarray(line, np.float64) for line in values.values()])
    if log and (drawn > 0).any():
        axes.set_yscale("log", nonpositive="mask")
    if len(values) <= MOST_NAMES:
        figure.legend(loc="outside right center", fontsize=8)
    else:
        shades = mpl.colors.ListedColormap(colours(np.linspace(0, 0.9, 256)))
        bar = figure.colorbar(ScalarMappable(Normalize(1, len(values)), shades), ax=axes, label="layer, by depth")
        bar.outline.set_visible(False)
    return figure


@mpl.rc_context(RC)
def alpha_over_depth(depths: np.ndarray, names: Sequence[str], alphas: Mapping[int, np.ndarray]) -> Figure:
    """Power-law exponents over the depth of the network.

    Args:
        depths (`np.ndarray` of shape `(layers,)`): places of the layers that have an exponent.
        names (`Sequence[str]`): of these layers.
        alphas (`Mapping[int, np.ndarray]`): epoch -> means over the checkpoints, `(layers,)`.

    Returns:
        `Figure`: a line for each epoch.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    colours = mpl.colormaps["cividis"]
    last = max(1, len(alphas) - 1)
    for index, (epoch, line) in enumerate(alphas.items()):
        axes.plot(depths, line, marker="o", markersize=4, color=colours(0.9 * index / last), label=f"epoch {epoch}")
    if len(names) <= MOST_NAMES:
        axes.set_xticks(depths, names, rotation=30, ha="right", fontsize=8)
    axes.set(xlabel="layer, by depth", ylabel="power-law exponent alpha")
    axes.margins(x=0.05)
    figure.legend(loc="outside right center")
    return figure
