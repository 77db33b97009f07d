"""The pictures of the report, as PNG: readable in grey (lightness, markers and dashes differ) and on a phone (narrow).

A curve is (arm, values): curves of one arm share a look and one entry in the legend, so that seeds show as a bundle.
"""

from __future__ import annotations

import io
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

# Colours of different lightness, a marker and a dash for each arm, so that the plots read in grey too.
LOOKS = [
    ("#0B3C7D", "o", "-"),
    ("#E8850C", "s", "--"),
    ("#1B7F5C", "^", "-."),
    ("#C06FA5", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#8C2D04", "P", "--"),
]
WIDTH = 6.4  # inches; with this font a phone shows letters of some 9 pixels
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}


def _look(arm: str, arms: list[str]) -> dict:
    colour, marker, dash = LOOKS[arms.index(arm) % len(LOOKS)]
    return {"color": colour, "marker": marker, "linestyle": dash, "markersize": 5}


def _arms(curves) -> list[str]:
    return list(dict.fromkeys(arm for arm, *_ in curves))


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2)


def _title(figure, text: str) -> None:
    figure.suptitle("\n".join(textwrap.fill(line, 66) for line in text.split("\n")), fontsize=11)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def _grid(count: int, height: float):
    """Axes of `count` panels, two a row, in their order; the rest is hidden."""
    rows = (count + 1) // 2
    figure, axes = plt.subplots(
        rows, min(count, 2), figsize=(WIDTH, height * rows + 1.2), layout="constrained", squeeze=False
    )
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


@plt.rc_context(STYLE)
def loss(curves: list[tuple[str, list, list]], title: str) -> bytes:
    """Training and held-out loss. A curve is (arm, [[step, training loss]], [[step, held-out loss]])."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    arms = _arms(curves)
    for arm, training, held_out in curves:
        look = _look(arm, arms)
        for points, extra, what in (
            (training, {"marker": "", "linewidth": 1, "alpha": 0.6}, "training"),
            (held_out, {"linewidth": 2}, "held-out"),
        ):
            steps, losses = np.array(points, dtype=float).reshape(-1, 2).T
            axes.plot(steps, losses, **{**look, **extra}, label=f"{arm}, {what}")
    axes.set(xlabel="step", ylabel="masked-LM loss (nats a token)")
    _legend(figure, axes)
    _title(figure, title)
    return _png(figure)


@plt.rc_context(STYLE)
def panels(curves: dict[str, list[tuple]], title: str, xlabel: str, ylabel: str | dict[str, str]) -> bytes:
    """A panel for each key; a curve is (arm, values) over the layers, or (arm, values, steps).

    `ylabel` is that of every panel, or {key: label}.

    Where values differ by orders of magnitude, the axis is logarithmic beyond 1.
    """
    figure, axes = _grid(len(curves), 2.5)
    arms = _arms(curve for lines in curves.values() for curve in lines)
    for place, lines in zip(axes, curves.values(), strict=True):
        for arm, values, *steps in lines:
            place.plot(steps[0] if steps else range(len(values)), values, **_look(arm, arms), label=arm)
    for place, name in zip(axes, curves, strict=True):
        place.set_title(name)
        place.set(xlabel=xlabel, ylabel=ylabel if isinstance(ylabel, str) else ylabel[name])
        place.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        values = np.concatenate([np.asarray(one, dtype=float) for _, one, *_ in curves[name]])
        if np.nanmax(np.abs(values), initial=0) > 30 * max(np.nanmedian(np.abs(values)), 1):
            place.set_yscale("symlog", linthresh=1)
    _legend(figure, axes[0])
    _title(figure, title)
    return _png(figure)


@plt.rc_context({**STYLE, "font.size": 13, "axes.titlesize": 13})
def bundles(curves: dict[str, list[tuple]], bold: tuple[str, ...], axes_of: dict[str, tuple[str, str]]) -> bytes:
    """Panels side by side, to be read at half the width: a thin line a run, and the median of an arm in bold.

    Args:
        curves: {title of the panel: [(arm, values, steps)]}; NaN leaves a gap.
        bold: the arms whose runs are drawn; of every other arm, the median alone, thin.
        axes_of: {title: (label of the axis, its scale: "linear" from 0 on, or "log")}.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.4), layout="constrained", squeeze=False)
    arms = _arms(curve for lines in curves.values() for curve in lines)
    arms = [arm for arm in bold if arm in arms] + [arm for arm in arms if arm not in bold]
    for place, (name, lines) in zip(axes.flat, curves.items(), strict=True):
        label, scale = axes_of[name]
        for arm in arms:  # a later one lies on top: its dashes leave an earlier one that coincides visible
            look = {**_look(arm, arms), "marker": ""}
            runs = [(steps, values) for other, values, steps in lines if other == arm]
            count = f"{len(runs)} run" + "s" * (len(runs) != 1)
            if arm in bold:
                for steps, values in runs:
                    place.plot(steps, values, **{**look, "linestyle": "-"}, linewidth=0.9, alpha=0.55)
            width = 3.2 if arm in bold else 1.1
            place.plot(*_median(runs), **look, linewidth=width, label=f"{arm}: median of {count}")
        place.set_yscale(scale)
        if scale == "linear":
            highest = max((np.nanmax(values, initial=0) for _, values, _ in lines), default=0)
            place.set_ylim(-0.03 * (highest or 1), 1.06 * (highest or 1))
        else:  # 5, 10, 20 and not 10^1
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.yaxis.set_major_formatter(ScalarFormatter())
            place.yaxis.set_minor_formatter(NullFormatter())
        place.set(title=name, xlabel="training step", ylabel=label)
        place.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return _png(figure)


def _median(runs: list[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """Steps that more than half of the runs reached, and the median over these runs at each."""
    at = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    there = {step: [one[step] for one in at if step in one] for step in sorted(set().union(*at))}
    there = {step: values for step, values in there.items() if 2 * len(values) > len(at)}
    return list(there), [float(np.median(values)) for values in there.values()]


@plt.rc_context(STYLE)
def damage(gaps: list[tuple[str, dict[str, tuple[float, float]]]], title: str) -> bytes:
    """Gap of the held-out loss to float32 in thousandths of a nat: a mark a run, a group a scheme, bars for errors.

    A run is (arm, {scheme: (gap, standard error)}), both in nats; one that is not finite is left out. Where gaps differ
    by orders of magnitude, the axis is logarithmic beyond 1.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    arms = _arms(gaps)
    kinds = list(dict.fromkeys(kind for _, found in gaps for kind in found))
    seen = [0.0]
    for number, (arm, found) in enumerate(gaps):
        look = _look(arm, arms)
        shift = (arms.index(arm) - (len(arms) - 1) / 2) * 0.8 / max(len(arms), 3)
        # Runs of an arm stand a little apart, so that their bars can be told apart.
        shift += (sum(other == arm for other, _ in gaps[:number]) % 4 - 1.5) * 0.05
        shown = {kind: pair for kind, pair in found.items() if np.isfinite(pair[0])}
        values, errors = 1000 * np.array(list(shown.values()), dtype=float).reshape(-1, 2).T
        places = [kinds.index(kind) + shift for kind in shown]
        bars = {"yerr": np.nan_to_num(errors), "elinewidth": 1, "capsize": 2}
        axes.errorbar(places, values, **{**look, "linestyle": "", "markersize": 6}, **bars, label=arm)
        seen.extend(values)
    axes.axhline(0, color="0.3", linewidth=0.8)
    if max(np.abs(seen)) > 30 * max(np.median(np.abs(seen[1:] or [0])), 1):
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(3 * min(*seen, -1), 3 * max(*seen, 1))
    axes.set_xticks(range(len(kinds)), [textwrap.fill(kind, 11) for kind in kinds], fontsize=9)
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylabel("held-out loss over float32 (millinats)")
    _legend(figure, axes)
    _title(figure, title)
    return _png(figure)


@plt.rc_context({**STYLE, "axes.grid": False})
def attention(maps: list[tuple[str, list[str], np.ndarray, np.ndarray]], title: str) -> bytes:
    """Attention maps in grey, the null mass as last column. A map is (caption, tokens, (T, T), null (T,))."""
    rows = (len(maps) + 1) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(WIDTH, 3.4 * rows + 1), layout="constrained", squeeze=False, sharex=False
    )
    for spare in axes.flat[len(maps) :]:
        spare.set_visible(False)
    for place, (caption, tokens, weights, null) in zip(axes.flat, maps, strict=False):
        image = place.imshow(np.column_stack([weights, null]), cmap="Greys", vmin=0, vmax=1, aspect="auto")
        place.axvline(len(tokens) - 0.5, color="0.5", linewidth=0.8, linestyle=":")
        place.set_xticks(range(len(tokens) + 1), [*tokens, "null"], rotation=90, fontsize=8)
        place.set_yticks(range(len(tokens)), tokens, fontsize=8)
        place.set_title(textwrap.fill(caption, 34), fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.6, location="bottom", label="attention weight")
    _title(figure, title)
    return _png(figure)


BINS = np.linspace(-20, 20, 161)  # of standardised activations; what lies beyond falls into the outermost ones


@plt.rc_context(STYLE)
def histograms(found: dict[str, list[tuple[str, np.ndarray]]], title: str) -> bytes:
    """Densities of standardised activations beside a Gaussian, a panel a layer. A curve is (arm, counts in BINS)."""
    figure, axes = _grid(len(found), 2.3)
    arms = _arms(curve for lines in found.values() for curve in lines)
    middles = (BINS[1:] + BINS[:-1]) / 2
    for place, (name, lines) in zip(axes, found.items(), strict=True):
        lowest, widest = 1.0, 6.0
        for arm, counts in lines:
            widest = max(widest, np.abs(middles[counts > 0]).max(initial=0))
            density = counts / counts.sum() / np.diff(BINS)
            lowest = min(lowest, density[density > 0].min())
            look = {**_look(arm, arms), "marker": ""}
            place.plot(middles, np.where(density > 0, density, np.nan), **look, label=arm, drawstyle="steps-mid")
        place.plot(middles, np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), color="0.5", lw=1, label="Gaussian")
        place.set_yscale("log")
        place.set_ylim(lowest / 2, 2)
        place.set_xlim(-widest, widest)
        place.set_title(name)
        place.set(xlabel="standard deviations", ylabel="density")
    _legend(figure, axes[0])
    _title(figure, title)
    return _png(figure)
