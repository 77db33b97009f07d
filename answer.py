"""What is compared between the arms, and what follows: the metrics of a run, the comparisons, the answer in words."""

from __future__ import annotations

import numpy as np

from outliers import IDLE, OUTLIER
from pairs import CONFIDENCE, TEST, Comparison, compare
from runs import Run, paired
from tables import figure, spread

# One metric was named beforehand, because the hypothesis ends there: outliers matter for what they do to quantization,
# and static per-tensor ranges are what they break. All others are looked at to explain it, and the more one looks at,
# the more likely one of them stands out by chance.
PRIMARY = "w8a8_static_gap"
BASELINE = "softmax0"
NEGLIGIBLE = 0.01  # nats; a change of the perplexity by one per cent, which nobody would quantize differently for

METRICS = {  # key: (label, the better end: -1 low, 0 neither)
    PRIMARY: ("W8A8 static: held-out loss over float32, nats", -1),
    "held_out_loss": ("held-out loss in float32, nats", -1),
    "bfloat16_gap": ("bfloat16: loss over float32, nats", -1),
    "w8a8_dynamic_gap": ("W8A8 dynamic: loss over float32, nats", -1),
    "w4_weight_only_gap": ("W4 weights: loss over float32, nats", -1),
    "ffn_output_kurtosis": ("FFN output: excess kurtosis, mean of layers", -1),
    "ffn_output_inf_norm": ("FFN output: infinity norm, largest layer", -1),
    "residual_kurtosis": ("residual stream: excess kurtosis, mean of layers", -1),
    "residual_inf_norm": ("residual stream: infinity norm, largest layer", -1),
    "residual_outliers": (f"residual stream: entries beyond ±{OUTLIER:g}, %", -1),
    "residual_ratio": ("residual stream: largest over median magnitude", -1),
    "context_kurtosis": ("attention context: excess kurtosis, mean of layers", -1),
    "attention_output_kurtosis": ("attention output: excess kurtosis, mean of layers", -1),
    "sink_rate_first": ("sink rate of the first token, %", 0),
    "sink_rate_any": ("sink rate of any token, %", 0),
    "null_mass": ("null mass, mean of heads, %", 0),
    "idle_heads": (f"heads that do nothing (> {IDLE[1]:.0%} idle mass)", 0),
    "half_idle_heads": (f"heads that do little (> {IDLE[0]:.0%} idle mass)", 0),
}
GLANCE = (PRIMARY, "held_out_loss", "ffn_output_kurtosis", "residual_inf_norm", "idle_heads", "null_mass")


def metrics(run: Run) -> dict[str, float]:
    """Every metric of METRICS; NaN where the model lacks the place."""

    def layers(place: str, statistic: str) -> np.ndarray:
        found = [values[statistic] for name, values in run.places.items() if name.endswith(f".{place}")]
        return np.array(found or [np.nan], dtype=float)

    def heads(statistic: str) -> np.ndarray:
        return np.array([value for layer in run.attention.values() for value in layer[statistic]] or [np.nan])

    found = {"held_out_loss": run.damage["schemes"]["float32"]["loss"]}
    for scheme in ("w8a8_static", "bfloat16", "w8a8_dynamic", "w4_weight_only"):
        found[f"{scheme}_gap"] = run.damage["schemes"].get(scheme, {}).get("gap", np.nan)
    found["ffn_output_kurtosis"] = layers("ffn_output", "kurtosis_sequence").mean()
    found["ffn_output_inf_norm"] = layers("ffn_output", "inf_norm").max()
    found["residual_kurtosis"] = layers("ffn_residual", "kurtosis_sequence").mean()
    found["residual_inf_norm"] = layers("ffn_residual", "inf_norm").max()
    found["residual_outliers"] = 100 * layers("ffn_residual", "outlier_share").mean()
    found["residual_ratio"] = layers("ffn_residual", "top1_to_median").mean()
    found["context_kurtosis"] = layers("context", "kurtosis_sequence").mean()
    found["attention_output_kurtosis"] = layers("attention_output", "kurtosis_sequence").mean()
    for key in ("sink_rate_first", "sink_rate_any", "null_mass"):
        found[key] = 100 * heads(key).mean()
    found["half_idle_heads"], found["idle_heads"] = ((heads("idle_mass") > bound).sum() for bound in IDLE)
    return {key: float(found[key]) for key in METRICS}


def comparisons(runs: list[Run]) -> dict[str, dict[str, Comparison]]:
    """{arm: {metric: comparison with softmax0}} of all arms that have a pair."""
    by_arm = {arm: {seed: metrics(run) for seed, run in found.items()} for arm, found in paired(runs).items()}
    found = {}
    for arm in by_arm:
        if arm != BASELINE and BASELINE in by_arm:
            for metric in METRICS:
                before, after = (
                    {seed: values[metric] for seed, values in by_arm[name].items()} for name in (BASELINE, arm)
                )
                if (comparison := compare(before, after)) is not None:
                    found.setdefault(arm, {})[metric] = comparison
    return found


def answer(runs: list[Run], compared: dict[str, dict[str, Comparison]]) -> str:
    """The answer in one sentence for each arm, with its uncertainty; what cannot be concluded is said."""
    if any(run.results and run.results["test_pipeline"] for run in runs):
        return "None: --test_pipeline made these runs, which show that the pipeline works, and nothing else."
    found = {arm: metric[PRIMARY] for arm, metric in compared.items() if PRIMARY in metric}
    if not found:
        return (
            f"None: there is no pair here, that is, a run of {BASELINE} and one of another n with the same seed, text, "
            "tokenizer and steps."
        )
    sentences = []
    for arm, one in found.items():
        costs = (
            f"static W8A8 quantization costs {arm} {spread(one.mean, one.std)} nats of held-out loss, "
            f"{BASELINE} {spread(one.baseline_mean, one.baseline_std)}"
        )
        if one.low is None:
            sentences.append(
                f"Open: in one pair of runs {costs}; one pair has no interval, so nothing can be concluded about {arm}."
            )
            continue
        if one.low <= 0 <= one.high:
            verdict = "no difference is shown"
        elif abs(one.difference) < NEGLIGIBLE:
            verdict = f"a difference is shown, but one too small to matter (under {NEGLIGIBLE:g} nats)"
        else:
            verdict = f"{arm} makes quantization {'less' if one.difference < 0 else 'more'} harmful here"
        if max(abs(one.mean), abs(one.baseline_mean)) < NEGLIGIBLE:
            verdict = f"there is nothing to rescue, quantization harms neither arm (under {NEGLIGIBLE:g} nats)"
        sentences.append(
            f"{verdict[0].upper()}{verdict[1:]}: over {one.pairs} pairs of runs {costs} (mean ± standard deviation "
            f"over seeds), a difference of {figure(one.difference)} nats with a {CONFIDENCE:.0%} interval from "
            f"{figure(one.low)} to {figure(one.high)} ({TEST}, p = {one.p:.2g})."
        )
    return " ".join(sentences)
