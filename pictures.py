"""The pictures of the report: their data, taken from the runs, and their captions. plots.py draws them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import plots
from answer import GAPS, PRIMARY_ARM, mean_losses
from held_out import evenly_spread
from measurement import HISTOGRAM_TEXTS
from outliers import PLACES, SINK
from quantization import SCHEMES, bootstrap_difference
from record import by_layer
from runs import BINS, Run, arms
from sets import BASELINE

# Places with a panel in kurtosis.png and norms.png.
PANELS = ("context", "attention_output", "attention_layernorm", "ffn_intermediate", "ffn_output", "ffn_residual")
KURTOSIS = (plots.KURTOSIS, "symlog")  # label of the axis, its scale
NORM = ("infinity norm", "log")
EMERGING = {  # panels of emergence.png: statistic: (title, factor, (label of the axis, its scale))
    "ffn_output.kurtosis_sequence": ("FFN output: kurtosis", 1, KURTOSIS),
    "ffn_residual.kurtosis_sequence": ("residual stream: kurtosis", 1, KURTOSIS),
    "ffn_output.inf_norm": ("FFN output: norm", 1, NORM),
    "ffn_residual.inf_norm": ("residual stream: norm", 1, NORM),
    "attention.sink_rate_any_renormalised": ("sinks, renormalised", 100, ("% of heads and texts", "linear")),
    "attention.null_mass": ("null mass", 100, ("% of the attention", "linear")),
}
SEEDS = {  # panels of emergence_seeds.png, in the same form
    "attention.sink_rate_any": ("Attention sinks", 100, ("% of heads and texts", "linear")),
    "ffn_residual.inf_norm": ("Residual stream", 1, ("largest entry", "log")),
}
LEADING = (BASELINE, PRIMARY_ARM)  # the arms of the primary question are drawn wide, with every run


class Picture(NamedTuple):
    title: str
    caption: str  # a sentence or several, printed below the picture
    png: bytes


def pictures(runs: list[Run], sequences: int) -> dict[str, Picture]:
    """{file name: picture} for the runs of one set; pictures without data are left out."""
    trained = [run for run in runs if not run.diverged]
    looks = plots.looks(list(arms(runs)), LEADING)
    made = {
        "emergence_seeds.png": emergence_seeds(runs, looks),
        "loss.png": loss(runs, looks),
        "damage.png": damage(runs, looks),
        "kurtosis.png": by_place(trained, looks, "kurtosis_sequence", KURTOSIS, sequences),
        "norms.png": by_place(trained, looks, "inf_norm", NORM, sequences),
        "histograms.png": histograms(trained, looks),
        "attention_map.png": attention_map(trained, looks),
        "emergence.png": emergence(runs, looks),
    }
    return {name: picture for name, picture in made.items() if picture}


def lines_caption(runs: list[Run], looks: dict[str, plots.Look]) -> str:
    """The meaning of thin and thick lines; empty if every arm has one run."""
    if len(runs) == len(arms(runs)):
        return ""
    others = (
        "" if all(look.leading for look in looks.values()) else " Arms without a thick line: only the median is drawn."
    )
    return f" Thin lines are runs; a thick line is the median of its arm.{others}"


# ------------------------------------------------------------------------------------------------- during the training


def emergence_curves(runs: list[Run], statistics: dict[str, tuple]) -> tuple[dict[str, list[tuple]], str]:
    """({title: curves}, the number of texts behind them); `statistics` is {name: (title, factor, axis)}."""
    trained = [run for run in runs if run.results]
    curves: dict[str, list[tuple]] = {}
    for statistic, (title, factor, _) in statistics.items():
        reduce = np.max if "inf_norm" in statistic else np.mean
        for run in trained:
            entries = run.results["emergence"]
            for_layers = [by_layer(entry, statistic) for entry in entries]
            if entries and all(len(values) for values in for_layers):
                steps = [entry["step"] for entry in entries]
                values = [factor * reduce(values) for values in for_layers]
                curves.setdefault(title, []).append((run.arm, values, steps))
    return curves, "/".join(sorted({str(run.results["emergence_texts"]) for run in trained}))


def emergence_seeds(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    curves, watched = emergence_curves(runs, SEEDS)
    if len(curves) < len(SEEDS):
        return None
    caption = (
        f"Sinks: share of heads and texts in which one token gets more than {SINK:.0%} of the attention. Residual "
        f"stream: infinity norm of the largest layer. Both on {watched} held-out texts, starting before the first "
        f"update.{lines_caption(runs, looks)}"
    )
    axes_of = {title: axis for title, _, axis in SEEDS.values()}
    return Picture("Sinks and outliers during training", caption, plots.bundles(curves, looks, axes_of))


def emergence(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    curves, watched = emergence_curves(runs, EMERGING)
    if not curves:
        return None
    title = "Outliers and attention during training"
    caption = (
        f"{title}, starting before the first update: {watched} texts evenly spread over the held-out split, unmasked, "
        "eval mode, padding left out, as in the analysis. Kurtosis and attention: mean of the layers; norms: the "
        f"largest layer.{lines_caption(runs, looks)}"
    )
    axes_of = {title: axis for title, _, axis in EMERGING.values()}
    return Picture(title, caption, plots.panels(curves, looks, title, "step", axes_of))


def loss(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    """Training and held-out loss of all runs, also of those that diverged, and the differences within pairs."""
    trained = [run for run in runs if run.results]
    if not trained:
        return None
    training, held_out = (
        {run: history_of(run, key) for run in trained} for key in ("loss_history", "validation_loss_history")
    )
    baseline = {run.results["seed"]: held_out[run] for run in trained if run.arm == BASELINE}
    differences = []
    for run in trained:
        partner = baseline.get(run.results["seed"], {})
        common = [step for step in held_out[run] if step in partner]
        if run.arm != BASELINE and common:
            differences.append((run.arm, [held_out[run][step] - partner[step] for step in common], common))
    curves = ([(run.arm, [*of[run].values()], [*of[run]]) for run in trained] for of in (training, held_out))
    below = f" Below: held-out loss minus that of {BASELINE} with the same seed." if differences else ""
    gone = [f" {run.name} {run.ending}." for run in trained if run.diverged]
    caption = (
        "Held-out loss (marked) and training loss (dotted: the median over the runs of an arm), in nats per masked "
        f"token.{below}{lines_caption(trained, looks)}{''.join(gone)}"
    )
    return Picture("Masked-LM loss during training", caption, plots.loss(*curves, differences, BASELINE, looks))


def history_of(run: Run, key: str) -> dict[int, float]:
    """{step: loss} from a history in the results; NaN where the loss was not finite."""
    return {step: np.nan if value is None else value for step, value in run.results[key]}


# ------------------------------------------------------------------------------------------------- the finished models


def damage(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    """The gap of every scheme, for each run, and the mean of each arm with its interval over texts."""
    trained = [run for run in runs if not run.diverged]
    gaps: dict[str, dict[str, tuple]] = {}
    lost = [f"{run.name} (diverged)" for run in runs if run.diverged]
    for scheme in GAPS.values():
        label = SCHEMES[scheme]
        for arm, of_arm in arms([run for run in trained if scheme in run.damage["schemes"]]).items():
            values = {run: run.damage["schemes"][scheme]["gap"] for run in of_arm}
            gaps.setdefault(label, {})[arm] = [*values.values()], over_texts(of_arm, scheme)
            lost += [f"{run.name}, {label} (not finite)" for run, gap in values.items() if not np.isfinite(gap)]
    if not gaps:
        return None
    several = len(trained) > len(arms(trained))
    caption = (
        "Held-out loss of the quantized models minus that of float32, in thousandths of a nat per masked token. "
        + ("A small mark is a run, a large one the mean of an arm; a bar" if several else "A bar")
        + " is the 95% interval over texts (bootstrap), for these models only."
        + (f" Without a mark: {'; '.join(lost)}." if lost else "")
    )
    return Picture("Quantization damage", caption, plots.damage(gaps, looks))


def over_texts(runs: list[Run], scheme: str) -> tuple[float, float] | None:
    """95 % bootstrap interval over texts of the mean gap of runs, in nats; None if the losses of texts are unknown.

    It is computed as the difference from a model that the scheme leaves unchanged.
    """
    harmed = mean_losses(runs, scheme)
    if harmed is None:
        return None
    unharmed = {**harmed, "texts": dict.fromkeys(("float32", scheme), harmed["texts"]["float32"])}
    interval = bootstrap_difference(unharmed, harmed, scheme)
    return interval if np.isfinite(interval).all() else None


def by_place(
    runs: list[Run], looks: dict[str, plots.Look], statistic: str, axis: tuple[str, str], sequences: int
) -> Picture | None:
    """A statistic of the activations over the layers, with a panel for each place."""
    curves: dict[str, list[tuple]] = {}
    for place in PANELS:
        for run in runs:
            values = by_layer({name: of_place[statistic] for name, of_place in run.places.items()}, place)
            if len(values):
                curves.setdefault(PLACES[place].label, []).append((run.arm, values, range(len(values))))
    if not curves:
        return None
    title = f"{axis[0].capitalize()} of the activations"
    caption = (
        f"{title} by layer and place, on {sequences:,} held-out texts in eval mode"
        + (" (a Gaussian has 0)" if axis is KURTOSIS else "")
        + ". All panels have the same scale. The residual stream is the input of a LayerNorm."
        + lines_caption(runs, looks)
    )
    return Picture(title, caption, plots.panels(curves, looks, title, "layer", dict.fromkeys(curves, axis)))


def histograms(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    of_layers: dict[str, list] = {}
    for run in runs:
        for layer, counts in run.histograms.items():
            of_layers.setdefault(layer, []).append((run.arm, counts))
    if not of_layers:
        return None
    chosen = evenly_spread(len(of_layers), 6)  # of deeper models, some layers
    shown = {layer: curves for i, (layer, curves) in enumerate(of_layers.items()) if i in chosen}
    caption = (
        f"Density of the standardised entries of the FFN output, on {HISTOGRAM_TEXTS} texts: mean over the runs of an "
        f"arm. Entries beyond ±{BINS[-1]:g} standard deviations are counted in the outermost bins."
    )
    return Picture("FFN output beside a Gaussian", caption, plots.histograms(shown, looks))


def attention_map(runs: list[Run], looks: dict[str, plots.Look]) -> Picture | None:
    """Maps of the first run of each arm: of up to two arms on every text, of more arms on the first text only."""
    first = {arm: of_arm[0].maps for arm, of_arm in arms(runs).items()}
    shown = {arm: first[arm] for arm in looks if first.get(arm)}
    if not shown:
        return None
    rows = []
    for text in range(max(map(len, shown.values())) if len(shown) <= 2 else 1):
        maps = [
            (f"{arm}: {caption}\nnull mass {100 * max(null.mean(), 0):.0f}%", tokens, weights, null)
            for arm, of_arm in shown.items()
            for caption, tokens, weights, null in of_arm[text : text + 1]
        ]
        rows += [maps[i : i + 2] for i in range(0, len(maps), 2)]
    caption = (
        "Attention of the head that does least (largest idle mass), in the first run of each arm. A row is a query; "
        "the last column is the attention that goes to no token (null mass). The grey level is the square root of the "
        "weight, relative to the largest weight."
    )
    return Picture("Attention of the head that does least", caption, plots.attention(rows))
