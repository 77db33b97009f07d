"""The pictures of the report: which there are, their captions, and what of the runs they show. plots.py draws them."""

from __future__ import annotations

import numpy as np

import plots
from answer import PRIMARY_ARM
from held_out import evenly_spread
from measurement import HISTOGRAM_TEXTS
from outliers import SINK
from quantization import SCHEMES
from report import trained_on
from runs import Run, arms, by_layer
from sets import BASELINE

PANELS = {  # of kurtosis.png and norms.png
    "context": "attention context",
    "attention_output": "attention output (dense)",
    "attention_layernorm": "attention LayerNorm",
    "ffn_intermediate": "FFN intermediate",
    "ffn_output": "FFN output (dense)",
    "ffn_residual": "residual stream (into LayerNorm)",
}
EMERGING = {  # of emergence.png: statistic: (title, label of the axis)
    "ffn_output.kurtosis_sequence": ("FFN output: kurtosis", "excess kurtosis"),
    "ffn_output.inf_norm": ("FFN output: infinity norm", "infinity norm"),
    "ffn_residual.kurtosis_sequence": ("residual stream: kurtosis", "excess kurtosis"),
    "ffn_residual.inf_norm": ("residual stream: infinity norm", "infinity norm"),
    "attention.sink_rate_any_renormalised": ("sink rate, any token, renormalised", "share of texts and heads"),
    "attention.null_mass": ("null mass", "share of the attention"),
}
SEEDS = {  # of emergence_seeds.png: statistic: (title, label of the axis, its scale, factor)
    "attention.sink_rate_any": ("Attention sinks", "% of heads and texts", "linear", 100),
    "ffn_residual.inf_norm": ("Residual stream, largest entry", "infinity norm", "log", 1),
}


def pictures(runs: list[Run], sequences: int) -> dict[str, tuple[str, bytes]]:
    """{file name: (caption, PNG)}; a picture without data is left out."""
    made: dict[str, tuple[str, bytes]] = {}
    what = trained_on(runs)
    everyone, runs = runs, [run for run in runs if not run.diverged]

    def add(name: str, caption: str, draw, data, *extra) -> None:
        if data:
            made[f"{name}.png"] = (caption, draw(data, f"{caption}\n{what}", *extra))

    emerging, watched = emergence_curves(everyone, {key: (title, factor) for key, (title, *_, factor) in SEEDS.items()})
    if len(emerging) == len(SEEDS):
        growth = (
            f"Sinks (share of heads and texts in which one token gets more than {SINK:.0%} of the attention) and "
            "infinity norm of the residual stream (largest layer) during training, from before the first update on: a "
            f"thin line a run, in bold the median of an arm; {watched} held-out texts"
        )
        axes_of = {title: (label, scale) for title, label, scale, _ in SEEDS.values()}
        made["emergence_seeds.png"] = (growth, plots.bundles(emerging, (BASELINE, PRIMARY_ARM), axes_of))

    gaps, lost = [], [f"{run.name} (diverged)" for run in everyone if run.diverged]
    for run in runs:
        found = {name: (one["gap"], one["error"]) for name, one in run.damage["schemes"].items() if name != "float32"}
        lost += [
            f"{run.name}, {SCHEMES[name]} (not finite)" for name, pair in found.items() if not np.isfinite(pair[0])
        ]
        gaps.append((run.arm, {SCHEMES[name]: pair for name, pair in found.items()}))
    without = f". Without a mark: {'; '.join(lost)}" if lost else ""
    add("damage", f"Quantization damage, one mark a run (bars: standard error){without}", plots.damage, gaps)

    def layers(statistic: str) -> dict[str, list[tuple]]:
        found = {}
        for place, title in PANELS.items():
            curves = []
            for run in runs:
                values = by_layer({name: one[statistic] for name, one in run.places.items()}, place)
                if len(values):
                    curves.append((run.arm, values))
            if curves:
                found[title] = curves
        return found

    held_out = f"on {sequences:,} held-out texts, eval mode, one curve a run"
    kurtosis = f"Excess kurtosis of activations by layer and place (Gaussian = 0), {held_out}"
    axes = ("layer", "excess kurtosis")
    add("kurtosis", kurtosis, plots.panels, layers("kurtosis_sequence"), *axes)
    norms = f"Infinity norm of activations by layer and place, {held_out}"
    add("norms", norms, plots.panels, layers("inf_norm"), "layer", "infinity norm")

    emerging, watched = emergence_curves(everyone, {key: (title, 1) for key, (title, _) in EMERGING.items()})
    growth = (
        f"Emergence: outliers during training, from before the first update on. {watched} texts evenly spread over the "
        "held-out split, unmasked, eval mode, padding left out, as in the analysis (mean of the layers; norms: the "
        "largest)"
    )
    add("emergence", growth, plots.panels, emerging, "step", dict(EMERGING.values()))

    curves = [
        (run.arm + " (diverged)" * run.diverged, run.results["loss_history"], run.results["validation_loss_history"])
        for run in everyone
        if run.results
    ]
    add("loss", "Training and held-out loss, one curve a run", plots.loss, curves)

    maps = [(f"{arm}: {caption}", *rest) for arm, found in arms(runs).items() for caption, *rest in found[0].maps]
    add("attention_map", "Attention of the head that does least, with its null mass", plots.attention, maps)

    shown: dict[str, list] = {}
    for found in arms(runs).values():
        for layer, counts in found[0].histograms.items():
            shown.setdefault(layer, []).append((found[0].arm, counts))
    chosen = evenly_spread(len(shown), 6)  # of deeper models, some layers
    shown = {name: curves for i, (name, curves) in enumerate(shown.items()) if i in chosen}
    density = f"FFN output against a Gaussian, standardised, {HISTOGRAM_TEXTS} texts, the first run of every arm"
    add("histograms", density, plots.histograms, shown)
    return made


def emergence_curves(runs: list[Run], statistics: dict[str, tuple[str, float]]) -> tuple[dict[str, list[tuple]], str]:
    """({title: [(arm, values, steps)]}, how many texts they are of); `statistics` is {name: (title, factor)}.

    Results files that do not say how many were written when the texts were others (the shortest ones, masked): they
    are left out.
    """
    told = [run for run in runs if run.results and {"emergence", "emergence_texts"} <= run.results.keys()]
    curves: dict[str, list[tuple]] = {}
    for statistic, (title, factor) in statistics.items():
        reduce = np.max if "inf_norm" in statistic else np.mean
        for run in told:
            entries = run.results["emergence"]
            for_layers = [by_layer(entry, statistic) for entry in entries]
            if entries and all(len(values) for values in for_layers):
                steps = [entry["step"] for entry in entries]
                curves.setdefault(title, []).append(
                    (run.arm, [factor * reduce(values) for values in for_layers], steps)
                )
    return curves, "/".join(sorted({str(run.results["emergence_texts"]) for run in told}))
