"""The pictures of the report, as PNG: readable in grey (lightness, markers and dashes differ) and on a phone (narrow).

A picture has a short title; the report prints a caption with the details below it. An arm looks the same in every
picture (`looks`). A curve is (arm, values, steps) of one run. Curves are drawn thin, and the median of an arm thick.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np

from runs import BINS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Colours of different lightness, a marker and a dash for each arm, so that the plots read in grey too.
COLOURS = [
    ("#0B3C7D", "o", "-"),
    ("#E8850C", "s", "--"),
    ("#1B7F5C", "^", "-."),
    ("#C06FA5", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#8C2D04", "P", "--"),
    ("#A6A000", "X", "-."),
    ("#7B3FBF", "<", ":"),
]
WIDTH = 6.4  # inches; with this font a phone shows letters of some 10 pixels
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "figure.titlesize": 14,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a token or the name of a model may hold dollar signs
}
KURTOSIS = "excess kurtosis"  # the label of an axis on which a Gaussian is 0


@dataclass(frozen=True)
class Look:
    """How an arm is drawn."""

    colour: str
    marker: str
    dash: str
    leading: bool  # with a wide median and its single runs; other arms have a thin median only

    def line(self, **more) -> dict:
        """Arguments for Axes.plot."""
        width, size = (2.8, 6) if self.leading else (1.2, 4)
        look = {"color": self.colour, "marker": self.marker, "linestyle": self.dash}
        return {**look, "linewidth": width, "markersize": size, **more}


def looks(arms: list[str], leading: tuple[str, ...]) -> dict[str, Look]:
    """The look of every arm, leading arms first. All lead if they are at most three, or if none is in `leading`."""
    few = len(arms) <= 3 or not set(arms) & set(leading)
    ordered = sorted(arms, key=lambda arm: leading.index(arm) if arm in leading else len(leading))
    return {arm: Look(*COLOURS[i % len(COLOURS)], few or arm in leading) for i, arm in enumerate(ordered)}


# ------------------------------------------------------------------------------------------------ what pictures share


def _legend(figure, axes, more: list[Line2D] | tuple = ()) -> None:
    """One legend below all panels, with one entry for each label; `more` are additional handles."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True)) | {handle.get_label(): handle for handle in more}
    longest = max(map(len, unique), default=0)
    columns = 4 if longest <= 10 and len(unique) == 4 else 3 if longest <= 14 else 2
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns, columnspacing=1.2)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def _grid(count: int, height: float):
    """Axes of `count` panels, two in a row, each `height` inches high; a spare panel is hidden."""
    rows = (count + 1) // 2
    figure, axes = plt.subplots(rows, min(count, 2), figsize=(WIDTH, height * rows + 1.3), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _label_outside(axes, i: int, count: int, xlabel: str, ylabel: str | None) -> None:
    """Label panel `i` of a grid at its bottom and its left, or not at the left where `ylabel` is None."""
    if ylabel is None:
        axes.tick_params(labelleft=False)
    else:
        axes.set_ylabel(ylabel)
    if i + 2 < count:
        axes.tick_params(labelbottom=False)
    else:
        axes.set_xlabel(xlabel)


def _of_arm(curves: list[tuple], arm: str) -> list[tuple]:
    """[(steps, values)] of the runs of an arm."""
    return [(steps, values) for other, values, steps in curves if other == arm]


def _median(runs: list[tuple]) -> tuple[list, np.ndarray]:
    """(steps that more than half of the runs reached, the median of their finite values at each of these steps)."""
    reached = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    at_step = {step: [of_run[step] for of_run in reached if step in of_run] for step in sorted(set().union(*reached))}
    common = {step: np.array(values, float) for step, values in at_step.items() if 2 * len(values) > len(reached)}
    finite = [values[np.isfinite(values)] for values in common.values()]
    return list(common), np.array([np.median(values) if len(values) else np.nan for values in finite])


def _draw(axes, curves: list[tuple], looks: dict[str, Look], label: Callable = lambda arm, runs: arm, **more) -> None:
    """Draw the median of every arm and, behind it, a thin line for each run of a leading arm that has several runs.

    Arms are drawn in order: where two coincide, the earlier arm is visible between the dashes of the later one. `label`
    maps (arm, number of its runs) to the text in the legend.
    """
    for arm, look in looks.items():
        if not (runs := _of_arm(curves, arm)):
            continue
        if len(runs) > 1 and look.leading:
            for steps, values in runs:
                axes.plot(steps, values, **look.line(marker="", linestyle="-", linewidth=0.8, alpha=0.45, zorder=1.5))
        steps, median = _median(runs)
        every = max(1, len(steps) // 7)  # at most 14 markers on a line
        axes.plot(steps, median, **look.line(label=label(arm, len(runs)), markevery=every, **more))


def _scale(axis, kind: str, values: np.ndarray, linear_to: float = 1) -> None:
    """Make an axis logarithmic where its values span a wide range.

    Args:
        kind: "linear" leaves the axis linear. "log" makes it logarithmic if all values are above 0 and the largest is
            more than 10 times the smallest. "symlog" makes it linear between -`linear_to` and `linear_to`, so that 0 is
            shown, and logarithmic beyond, if the largest magnitude is more than 30 times `linear_to` and more than 30
            times the lower quartile of the magnitudes.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return
    sizes = np.abs(values)
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    if kind == "log" and 0 < 10 * values.min() < values.max():
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1,) if values.max() > 100 * values.min() else (1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    elif kind == "symlog" and sizes.max() > 30 * max(np.quantile(sizes, 0.25), linear_to):
        set_scale("symlog", linthresh=linear_to)
        ends = 1.6 * min(values.min(), 0) - 0.3 * linear_to, 1.6 * max(values.max(), 0) + 0.3 * linear_to
        axis.axes.set(**{f"{axis.axis_name}lim": ends})  # matplotlib's own margins are those of a linear axis
    else:
        return
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))  # 100 and not 10^2


# ------------------------------------------------------------------------------------------------------- the pictures


@plt.rc_context(STYLE)
def loss(
    training: list[tuple], held_out: list[tuple], differences: list[tuple], baseline: str, looks: dict[str, Look]
) -> bytes:
    """Training and held-out loss; below them the held-out loss minus that of `baseline`, pair by pair.

    Args:
        training, held_out: curves, in nats a token.
        differences: curves of the loss minus that of the baseline with the same seed; if empty, the second panel is
            left out.
    """
    heights = (1.5, 1) if differences else (1.5,)
    size = WIDTH, 7.0 if differences else 4.4
    figure, axes = plt.subplots(len(heights), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
    upper, lower = axes[0, 0], axes[-1, 0]
    for arm, look in looks.items():
        if runs := _of_arm(training, arm):
            upper.plot(*_median(runs), **look.line(marker="", linestyle=":", linewidth=1.6))
    _draw(upper, held_out, looks)
    upper.set(ylabel="nats a token", title="Masked-LM loss")
    if differences:
        lower.axhline(0, color="0.3", linewidth=1)
        _draw(lower, differences, looks)
        lower.set(ylabel="nats a token", title=f"Held-out loss minus that of {baseline}, same seed")
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=(1, 2, 5, 10)))
    kinds = [Line2D([], [], color="0.3", marker="o", label="held-out")]
    kinds += [Line2D([], [], color="0.3", linestyle=":", linewidth=1.6, label="training")]
    _legend(figure, upper, kinds)
    return _png(figure)


@plt.rc_context(STYLE)
def panels(
    curves: dict[str, list[tuple]], looks: dict[str, Look], title: str, xlabel: str, axes_of: dict[str, tuple[str, str]]
) -> bytes:
    """A panel for each key of `curves`; panels whose y axes have the same label share a scale.

    `axes_of` is {key: (label of the y axis, its kind as in `_scale`)}.
    """
    figure, axes = _grid(len(curves), 2.3)
    first: dict[str, object] = {}  # panel of each label
    for i, (place, (name, lines)) in enumerate(zip(axes, curves.items(), strict=True)):
        label, _ = axes_of[name]
        if label in first:
            place.sharey(first[label])
        first.setdefault(label, place)
        _draw(place, lines, looks)
        if label == KURTOSIS:
            place.axhline(0, color="0.3", linewidth=1, label="Gaussian", zorder=1)
        place.set_title(name)
        place.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=(1, 2, 5, 10)))
        same_as_left = i % 2 and axes_of[list(curves)[i - 1]][0] == label
        _label_outside(place, i, len(curves), xlabel, None if same_as_left else label)
    for label, place in first.items():
        same = [name for name in curves if axes_of[name][0] == label]
        values = [values for name in same for _, values, _ in curves[name]]
        _scale(place.yaxis, axes_of[same[0]][1], np.concatenate(values).astype(float))
    _legend(figure, axes[0])
    figure.suptitle(title)
    return _png(figure)


@plt.rc_context({**STYLE, "font.size": 13, "axes.titlesize": 13})
def bundles(curves: dict[str, list[tuple]], looks: dict[str, Look], axes_of: dict[str, tuple[str, str]]) -> bytes:
    """Panels side by side, readable at half the page width: medians of arms, thin lines for runs of leading arms.

    Args:
        curves: {title of the panel: curves}.
        axes_of: {title: (label of the y axis, its kind as in `_scale`; a linear one shows 0)}.
    """

    def counted(arm: str, runs: int) -> str:
        return f"{arm}: median of {runs} runs" if runs > 1 else f"{arm}: one run"

    figure, axes = plt.subplots(1, len(curves), figsize=(3.7 * len(curves), 4.0), squeeze=False)
    for place, (name, lines) in zip(axes.flat, curves.items(), strict=True):
        label, scale = axes_of[name]
        _draw(place, lines, looks, label=counted, marker="")
        _scale(place.yaxis, scale, np.concatenate([values for _, values, _ in lines]).astype(float))
        if scale == "linear":
            place.set_ylim(bottom=min(0, place.get_ylim()[0]))
            place.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))
        place.set(title=name, xlabel="training step", ylabel=label)
        place.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=(1, 2, 5, 10)))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return _png(figure)


@plt.rc_context(STYLE)
def damage(gaps: dict[str, dict[str, tuple]], looks: dict[str, Look]) -> bytes:
    """Held-out loss minus that of float32, in thousandths of a nat: a row for each scheme and arm.

    A small mark is a run. A large mark is the mean of an arm; it is left out if the gap of a run is not finite.

    Args:
        gaps: {scheme: {arm: ([gap of each run], (low, high): interval of their mean, or None)}}, all in nats.
    """
    looks = {arm: look for arm, look in looks.items() if any(arm in of_arms for of_arms in gaps.values())}
    pitch = len(looks) + 1  # rows of a scheme: its arms and an empty row
    height = (0.24 if len(looks) <= 3 else 0.17) * pitch * len(gaps) + 1.7
    figure, axes = plt.subplots(figsize=(WIDTH, height))
    every = []
    for i, of_arms in enumerate(gaps.values()):
        if i % 2:
            axes.axhspan(pitch * i - 1, pitch * (i + 1) - 1, color="0.95", linewidth=0)
        for j, (arm, look) in enumerate(looks.items()):
            of_runs, interval = of_arms.get(arm, ([], None))
            values = 1000 * np.array(of_runs, dtype=float)
            row, finite = pitch * i + j, values[np.isfinite(values)]
            every.extend(finite)
            style = {"color": look.colour, "marker": look.marker, "linestyle": ""}
            if len(values) > 1:
                axes.plot(finite, [row + 0.3] * len(finite), **style, markersize=4.5, fillstyle="none", alpha=0.8)
            if len(values) and len(finite) == len(values):
                low, high = 1000 * np.array(interval or (np.nan, np.nan))
                axes.plot([low, high], [row, row], color=look.colour, linewidth=2.5, solid_capstyle="butt")
                axes.plot(values.mean(), row, **style, markersize=7)
    for arm, look in looks.items():
        axes.plot([], [], color=look.colour, marker=look.marker, linestyle="", markersize=7, label=arm)
    axes.axvline(0, color="0.3", linewidth=1)
    _scale(axes.xaxis, "symlog", np.array(every), linear_to=10)
    middles = [pitch * i + (len(looks) - 1) / 2 for i in range(len(gaps))]
    axes.set_yticks(middles, [textwrap.fill(kind, 16) for kind in gaps])
    axes.set_ylim(pitch * len(gaps) - 1, -1)  # the first scheme on top
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("held-out loss over float32 (millinats a token)")
    _legend(figure, axes)
    figure.suptitle("Quantization damage")
    return _png(figure)


@plt.rc_context({**STYLE, "axes.grid": False})
def attention(rows: list[list[tuple[str, list[str], np.ndarray, np.ndarray]]]) -> bytes:
    """Attention maps in grey, at most two side by side, with the null mass as the last column.

    The grey level is the square root of a weight, relative to the largest weight of all maps: so small weights stay
    visible.

    Args:
        rows: of (caption, tokens, weights (T, T), null mass (T,)).
    """
    largest = max(max(weights.max(), null.max()) for row in rows for _, _, weights, null in row)
    norm = PowerNorm(0.5, vmin=0, vmax=largest)
    figure, axes = plt.subplots(len(rows), 2, figsize=(WIDTH, 3.4 * len(rows) + 1.3), squeeze=False)
    for places, row in zip(axes, rows, strict=True):
        for place in places[len(row) :]:
            place.set_visible(False)
        for i, (place, (caption, tokens, weights, null)) in enumerate(zip(places, row, strict=False)):
            image = place.imshow(np.column_stack([weights, null]), cmap="Greys", norm=norm, aspect="auto")
            place.axvline(len(tokens) - 0.5, color="0.5", linewidth=0.8, linestyle=":")
            place.set_xticks(range(len(tokens) + 1), [*tokens, "null"], rotation=90, fontsize=9)
            place.set_yticks(range(len(tokens)), tokens, fontsize=9)
            place.tick_params(length=2, labelleft=i == 0 or tokens != row[0][1])
            place.set_title(caption, fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.6, location="bottom", label="attention weight")
    figure.suptitle("Attention of the head that does least")
    return _png(figure)


@plt.rc_context(STYLE)
def histograms(of_layers: dict[str, list[tuple[str, np.ndarray]]], looks: dict[str, Look]) -> bytes:
    """Densities of standardised activations beside a Gaussian, with a panel for each layer.

    `of_layers` is {title: (arm, counts in BINS) of every run}; the mean density over the runs of an arm is drawn.
    """
    figure, axes = _grid(len(of_layers), 2.0)
    middles = (BINS[1:] + BINS[:-1]) / 2
    lowest = 1.0
    for i, (place, (name, runs)) in enumerate(zip(axes, of_layers.items(), strict=True)):
        for arm, look in looks.items():
            densities = [counts / counts.sum() / np.diff(BINS) for other, counts in runs if other == arm]
            if not densities:
                continue
            mean = np.mean(densities, axis=0)
            lowest = min(lowest, mean[mean > 0].min())
            shape = look.line(marker="", drawstyle="steps-mid", linewidth=1.8 if look.leading else 1)
            place.plot(middles, np.where(mean > 0, mean, np.nan), **shape, label=arm)
        gaussian = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi)
        place.plot(middles, gaussian, color="0.75", linewidth=5, zorder=1, label="Gaussian")
        place.set_title(name)
        place.set_xlim(BINS[0], BINS[-1])
        _label_outside(place, i, len(of_layers), "standard deviations", None if i % 2 else "density")
        place.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10), prune="both"))  # -20 and 20 would meet
    for place in axes:
        place.set_yscale("log")
        place.set_ylim(lowest / 2, 5)
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(figure, axes[0])
    figure.suptitle("FFN output beside a Gaussian")
    return _png(figure)
