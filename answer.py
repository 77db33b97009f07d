"""What is compared between the arms, and what follows: the metrics of a run, the comparisons, the answer in words.

The rules of the answer stand as one table in DEFINITIONS.md ("What is concluded"); a function here decides each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats

import quantization
from outliers import IDLE, OUTLIER
from pairs import POWER, SIGN_TEST, Comparison, compare, no_interval, percent
from quantization import SCHEMES
from runs import Run
from sets import BASELINE, ComparisonSet, comparison_sets
from tables import figure, spread

# One metric and one arm were named beforehand, because the hypothesis ends there: outliers matter for what they do to
# quantization, static per-tensor ranges are what they break, and softmax1 is the remedy that was proposed. All others
# are looked at to explain it, and the more one looks at, the more likely one of them stands out by chance.
PRIMARY = "w8a8_static_gap"
PRIMARY_ARM = "softmax1"
QUANTIZED = "w8a8_static_loss"
FLOAT32 = "held_out_loss"
MARGIN = 0.01  # nats; a change of the perplexity by one per cent, which nobody would quantize differently for

GAPS = {f"{scheme}_gap": scheme for scheme in SCHEMES if scheme != "float32"}
METRICS = {  # key: (label, the better end: -1 low, 0 neither)
    PRIMARY: ("W8A8 static: held-out loss over float32, nats", -1),
    QUANTIZED: ("W8A8 static: held-out loss, nats", -1),
    FLOAT32: ("held-out loss in float32, nats", -1),
    **{key: (f"{SCHEMES[scheme]}: loss over float32, nats", -1) for key, scheme in GAPS.items() if key != PRIMARY},
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
    "sink_rate_first_renormalised": ("sink rate of the first token, weights renormalised, %", 0),
    "sink_rate_any_renormalised": ("sink rate of any token, weights renormalised, %", 0),
    "sink_rate_any_or_null": ("sink rate of any token or nowhere, %", 0),
    "null_mass": ("null mass, mean of heads, %", 0),
    "idle_heads": (f"heads that do nothing (> {IDLE[1]:.0%} idle mass)", 0),
    "half_idle_heads": (f"heads that do little (> {IDLE[0]:.0%} idle mass)", 0),
}
GLANCE = (PRIMARY, QUANTIZED, FLOAT32, "ffn_output_kurtosis", "residual_inf_norm", "idle_heads", "null_mass")


def metrics(run: Run) -> dict[str, float | None]:
    """Every metric of METRICS; None where it was not measured, as where the model lacks the place.

    Of a run that diverged every loss and every gap is NaN, which is worse than any number, and nothing else is known.
    """
    if run.diverged:
        return {key: np.nan if key in (QUANTIZED, FLOAT32, *GAPS) else None for key in METRICS}

    def layers(place: str, statistic: str) -> np.ndarray | None:
        found = [values[statistic] for name, values in run.places.items() if name.endswith(f".{place}")]
        return np.array(found, dtype=float) if found else None

    def heads(statistic: str) -> np.ndarray | None:
        found = [value for layer in run.attention.values() for value in layer[statistic]]
        return np.array(found, dtype=float) if found else None

    found = {
        "ffn_output_kurtosis": (np.mean, layers("ffn_output", "kurtosis_sequence")),
        "ffn_output_inf_norm": (np.max, layers("ffn_output", "inf_norm")),
        "residual_kurtosis": (np.mean, layers("ffn_residual", "kurtosis_sequence")),
        "residual_inf_norm": (np.max, layers("ffn_residual", "inf_norm")),
        "residual_outliers": (lambda shares: 100 * shares.mean(), layers("ffn_residual", "outlier_share")),
        "residual_ratio": (np.mean, layers("ffn_residual", "top1_to_median")),
        "context_kurtosis": (np.mean, layers("context", "kurtosis_sequence")),
        "attention_output_kurtosis": (np.mean, layers("attention_output", "kurtosis_sequence")),
        **{
            key: (lambda shares: 100 * shares.mean(), heads(key))
            for key in METRICS
            if key.startswith("sink_rate") or key == "null_mass"
        },
        "half_idle_heads": (lambda masses: (masses > IDLE[0]).sum(), heads("idle_mass")),
        "idle_heads": (lambda masses: (masses > IDLE[1]).sum(), heads("idle_mass")),
    }
    values = {key: None if some is None else float(reduce(some)) for key, (reduce, some) in found.items()}
    schemes = run.damage["schemes"]
    values[FLOAT32] = schemes["float32"]["loss"]
    values[QUANTIZED] = schemes.get("w8a8_static", {}).get("loss")
    values |= {key: schemes.get(scheme, {}).get("gap") for key, scheme in GAPS.items()}
    return {key: values[key] for key in METRICS}


# -------------------------------------------------------------------------------------------------------- comparisons


@dataclass
class Finding:
    """A set of runs that agree, and what its pairs show: {arm: {metric: comparison with softmax0}}."""

    group: ComparisonSet
    compared: dict[str, dict[str, Comparison]]


def findings(runs: list[Run]) -> list[Finding]:
    """Of every set that has a pair, the headline's first; --test_pipeline's only where there are no other runs."""
    sets = comparison_sets(runs)
    return [Finding(one, comparisons(one)) for one in sets if one.pairs and one.test_pipeline == sets[0].test_pipeline]


def comparisons(group: ComparisonSet) -> dict[str, dict[str, Comparison]]:
    """{arm: {metric: comparison with softmax0}} of all arms that have a pair, the primary arm first.

    The arms but the primary one share an error of 5 % (Bonferroni).
    """
    found: dict[str, dict[str, Comparison]] = {}
    exploratory = [arm for arm in group.pairs if arm != PRIMARY_ARM]
    for arm in sorted(group.pairs, key=lambda arm: arm != PRIMARY_ARM):
        pairs = group.pairs[arm]
        before = {seed: metrics(pair[0]) for seed, pair in pairs.items()}
        after = {seed: metrics(pair[1]) for seed, pair in pairs.items()}
        found[arm] = {}
        for metric in METRICS:
            one = compare(
                {seed: values[metric] for seed, values in before.items()},
                {seed: values[metric] for seed, values in after.items()},
                tests=1 if arm == PRIMARY_ARM else len(exploratory),
            )
            if one is not None:
                if metric in GAPS:
                    one.texts_low, one.texts_high = over_texts(list(pairs.values()), GAPS[metric])
                found[arm][metric] = one
    return found


def over_texts(pairs: list[tuple[Run, Run]], scheme: str) -> tuple[float | None, float | None]:
    """95 % bootstrap interval over the held-out texts of the mean difference of the gaps; (None, None) without data.

    The texts are the same in every run, and are drawn for all runs together: the loss of each text is averaged over the
    pairs first, which gives the mean difference of every draw.
    """
    bootstrap = getattr(quantization, "bootstrap_difference", None)
    damages = [[run.damage for run in arm] for arm in zip(*pairs, strict=True)]
    every = [damage for arm in damages for damage in arm]
    known = all("masked" in one and {"float32", scheme} <= set(one.get("texts", {})) for one in every)
    if bootstrap is None or not known or any(one["masked"] != every[0]["masked"] for one in every):
        return None, None
    before, after = (
        {
            "masked": every[0]["masked"],
            "texts": {key: np.mean([one["texts"][key] for one in arm], axis=0).tolist() for key in ("float32", scheme)},
        }
        for arm in damages
    )
    sums = [values for one in (before, after) for values in one["texts"].values()]
    if not np.isfinite(np.array(sums, dtype=float)).all():
        return None, None
    low, high = bootstrap(before, after, scheme)
    return float(low), float(high)


# ----------------------------------------------------------------------------------------- decisions, one function each


def shown(one: Comparison) -> bool:
    """Whether the interval of the difference excludes 0 (or the sign test is significant, where it is the test)."""
    if one.test == SIGN_TEST:
        return one.p < 1 - one.confidence
    return one.low is not None and not one.low <= 0 <= one.high


def less(one: Comparison) -> bool:
    """Whether a difference that is shown is one downwards."""
    return one.lower > one.higher if one.test == SIGN_TEST else one.difference < 0


def within_margin(one: Comparison) -> bool:
    """Equivalence: both one-sided tests reject a difference of MARGIN or more (TOST; Schuirmann 1987)."""
    return one.low90 is not None and -MARGIN < one.low90 and one.high90 < MARGIN


def beyond_margin(one: Comparison) -> bool:
    """Whether the whole interval lies beyond MARGIN."""
    return one.low is not None and (one.low >= MARGIN or one.high <= -MARGIN)


def harmless(one: Comparison) -> tuple[bool, bool]:
    """(softmax0, the arm): whether the upper end of the interval of its own mean gap is below MARGIN."""
    if not one.finite:
        return False, False
    return tuple(upper is not None and upper < MARGIN for upper in (one.baseline_upper, one.upper))


def verdict(one: Comparison, arm: str) -> str:
    """What is concluded about the gap of static W8A8, without figures."""
    amount = "less" if one.difference is not None and one.difference < 0 else "more"
    if one.test == SIGN_TEST:
        if shown(one):
            return f"{arm} makes quantization {'less' if less(one) else 'more'} harmful here"
        return "undecided"
    if one.low is None:
        return "undecided"
    if shown(one) and within_margin(one):
        return f"{arm} differs, by less than the margin of {MARGIN:g} nats"
    if shown(one):
        sure = f"{arm} makes quantization {amount} harmful here"
        return sure if beyond_margin(one) else f"{sure}, though perhaps by less than the margin of {MARGIN:g} nats"
    if within_margin(one):
        return f"{arm} and {BASELINE} are equivalent (TOST, margin ±{MARGIN:g} nats)"
    return "undecided"


def rescue(one: Comparison, arm: str) -> str:
    """Whether there is anything to rescue, as the beginning of a sentence; empty where there may be."""
    baseline, other = harmless(one)
    if not baseline:
        return ""
    ends = f"upper end of the {percent(one.confidence)} interval of its mean gap under {MARGIN:g} nats"
    if other:
        return f"there is nothing to rescue, quantization harms neither {BASELINE} nor {arm} (of each, {ends}); "
    return f"there is nothing to rescue in {BASELINE} ({ends}); "


def no_better(gap: Comparison, loss: Comparison | None) -> str:
    """What must not be left out beside a smaller gap: that the quantized model itself is no better."""
    if loss is None or not (shown(gap) and less(gap)) or (shown(loss) and less(loss)):
        return ""
    if shown(loss):
        return ", but the quantized model is worse"
    return ", but the quantized model is no better (its loss is not shown to be lower)"


def few_pairs(one: Comparison) -> str:
    if one.pairs != 2 or one.low is None:
        return ""
    t = scipy.stats.t.ppf(1 - (1 - one.confidence) / 2, 1)
    return f", from two pairs only (t = {t:.1f})"


# -------------------------------------------------------------------------------------------------- the answer in words


def interval(one: Comparison) -> str:
    """Of the difference, in words."""
    if one.low is None:
        return no_interval(one)
    return f"{percent(one.confidence)} interval from {figure(one.low)} to {figure(one.high)}"


def losses(metric: dict[str, Comparison], arm: str) -> str:
    """Absolute losses of both arms, after quantization and before."""
    said = []
    for key, label in ((QUANTIZED, "loss after quantization"), (FLOAT32, "loss in float32")):
        if (one := metric.get(key)) is not None and one.finite:
            sure = "" if one.pairs == 1 else f" ({interval(one)})"
            said.append(
                f"{label}: {arm} {spread(one.mean, one.std)} nats, {BASELINE} "
                f"{spread(one.baseline_mean, one.baseline_std)}, difference {figure(one.difference)}{sure}"
            )
        elif one is not None:
            said.append(f"{label}: {interval(one)}")
    return "; ".join(said)


def failures(one: Comparison, arm: str, group: ComparisonSet) -> list[str]:
    """Which runs diverged in training, and in how many pairs which arm's quantized loss is not a number."""
    said = []
    diverged = {(run.arm, run.results["seed"]): run for run in group.runs if run.diverged}
    for name, seeds in ((BASELINE, one.baseline_not_finite), (arm, one.not_finite)):
        if lost := [seed for seed in seeds if (name, seed) not in diverged]:
            listed = ", ".join(map(str, lost))
            pairs = "the one pair" if one.pairs == 1 else f"{len(lost)} of {one.pairs} pairs"
            said.append(f"{name}'s loss after quantization is not a number in {pairs} (seed {listed})")
    for (name, seed), run in diverged.items():
        if name in (BASELINE, arm):
            said.append(f"seed {seed}: {name} diverged at step {run.results['diverged']['step']:,}")
    return said


def costs(one: Comparison, arm: str) -> str:
    return (
        f"static W8A8 quantization costs {arm} {spread(one.mean, one.std)} nats of held-out loss, "
        f"{BASELINE} {spread(one.baseline_mean, one.baseline_std)}"
    )


def texts(one: Comparison) -> str:
    if one.texts_low is None:
        return ""
    only = ", this pair only" if one.pairs == 1 else ""
    return f"95% interval over texts{only}: {figure(one.texts_low)} to {figure(one.texts_high)}"


def one_pair(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """One pair is told as a fact."""
    one = metric[PRIMARY]
    begin = f"Open: one pair (seed {one.seeds[0]}), no test"
    if not one.finite:
        told = ". ".join([begin, *failures(one, arm, group), losses(metric, arm)])
    else:
        sure = f" ({texts(one)})" if texts(one) else ""
        told = f"{begin}. In it {costs(one, arm)}, a difference of {figure(one.difference)} nats{sure}; " + "; ".join(
            [losses(metric, arm), *failures(one, arm, group)]
        )
    return f"{told}. Nothing can be concluded about {arm} beyond this pair."


def by_sign(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """Several pairs with a loss that is no number, or a run that diverged."""
    one = metric[PRIMARY]
    decided = one.lower + one.higher
    least = f"; {decided} pairs cannot give less than p = {min(1, 2 * 0.5**decided):.2g}" if decided else ""
    ties = f", {one.ties} tied and left out" if one.ties else ""
    said = (
        f"{capital(verdict(one, arm))}{no_better(one, metric.get(QUANTIZED))}: "
        f"{'; '.join(failures(one, arm, group))}. A loss that is not a number is worse than any that is one: static "
        f"W8A8 quantization costs {arm} less than {BASELINE} in {one.lower} of {one.pairs} pairs and more in "
        f"{one.higher}{ties} ({SIGN_TEST}, p = {one.p:.2g}{least})."
    )
    return f"{said} {capital(losses(metric, arm))}."


def by_mean(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """Several pairs, all finite."""
    one = metric[PRIMARY]
    said = rescue(one, arm) + verdict(one, arm) + no_better(one, metric.get(QUANTIZED)) + few_pairs(one)
    sure = f"{interval(one)}, {one.test}, p = {one.p:.2g}" if one.low is not None else interval(one)
    told = (
        f"{capital(said)}: over {one.pairs} pairs of runs {costs(one, arm)} (mean ± standard deviation over seeds), a "
        f"difference of {figure(one.difference)} nats ({sure})"
    )
    parts = [told, texts(one), losses(metric, arm), *failures(one, arm, group)]
    if verdict(one, arm) == "undecided" and one.detectable is not None:
        effect = f"a difference of {figure(one.detectable)} nats or more"
        parts.append(f"{one.pairs} pairs of this spread show {effect} with {POWER:.0%} power")
    return "; ".join(part for part in parts if part) + "."


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def of_arm(finding: Finding, arm: str) -> str:
    """The sentences about one arm."""
    metric = finding.compared[arm]
    if PRIMARY not in metric:
        return f"None about {arm}: static W8A8 quantization was not measured in a pair."
    one = metric[PRIMARY]
    if one.pairs == 1:
        said = one_pair(metric, arm, finding.group)
    elif not one.finite:
        said = by_sign(metric, arm, finding.group)
    else:
        said = by_mean(metric, arm, finding.group)
    if arm == PRIMARY_ARM:
        return said
    others = sum(name != PRIMARY_ARM for name in finding.compared)
    corrected = f" (Intervals and tests corrected for {others} exploratory arms, Bonferroni.)" if others > 1 else ""
    return f"Exploratory: {said}{corrected}"


def of_set(finding: Finding) -> str:
    said = [of_arm(finding, arm) for arm in finding.compared]
    if PRIMARY_ARM not in finding.compared:
        said.insert(0, f"None about {PRIMARY_ARM}, the arm named beforehand: it has no pair here.")
    return " ".join(said)


def answer(runs: list[Run], found: list[Finding]) -> str:
    """The answer from the headline's set, then from every other set with a pair; what cannot be concluded is said."""
    trained = [run for run in runs if run.results]
    if trained and all(run.results["test_pipeline"] for run in trained):
        return "None: --test_pipeline made these runs, which show that the pipeline works, and nothing else."
    if not found:
        return (
            f"None: there is no pair here, that is, a run of {BASELINE} and one of another n with the same seed, text, "
            "tokenizer, steps and settings."
        )
    said = [of_set(found[0])]
    for other in found[1:]:
        said.append(f"Another set of {len(other.group.runs)} runs, {other.group.steps:,} steps: {of_set(other)}")
    return " ".join(said)
