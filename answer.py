"""The metrics of a run, their comparison between arms, and the answer in words.

DEFINITIONS.md ("What is concluded") has the rules of the answer as a table; each rule is a function here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from experiment import BASELINE, PRIMARY_ARM
from outliers import IDLE, OUTLIER
from pairs import POWER, SIGN_TEST, Comparison, compare, compare_ratio, no_interval, percent
from quantization import SCHEMES, bootstrap_difference
from runs import Run
from sets import ComparisonSet, comparison_sets, in_a_pair
from tables import below_noise, ends, figure, spread

# One metric and one arm were named beforehand. They follow from the hypothesis: outliers matter because they damage
# quantization with static per-tensor ranges, and softmax1 is the remedy that was proposed. The other metrics and arms
# help to explain the result; the more of them there are, the likelier it is that one of them differs by chance.
PRIMARY = "w8a8_static_gap"
QUANTIZED = "w8a8_static_loss"
FLOAT32 = "held_out_loss"
MARGIN = 0.01  # nats: one per cent of the perplexity, too little to change how anybody would quantize

GAPS = {f"{scheme}_gap": scheme for scheme in SCHEMES if scheme != "float32"}
METRICS = {  # key: label
    PRIMARY: "W8A8 static: held-out loss over float32, nats",
    QUANTIZED: "W8A8 static: held-out loss, nats",
    FLOAT32: "held-out loss in float32, nats",
    **{key: f"{SCHEMES[scheme]}: loss over float32, nats" for key, scheme in GAPS.items() if key != PRIMARY},
    "ffn_output_kurtosis": "FFN output: excess kurtosis, mean of layers",
    "ffn_output_inf_norm": "FFN output: infinity norm, largest layer",
    "residual_kurtosis": "residual stream: excess kurtosis, mean of layers",
    "residual_inf_norm": "residual stream: infinity norm, largest layer",
    "residual_outliers": f"residual stream: entries beyond ±{OUTLIER:g}, %",
    "residual_ratio": "residual stream: largest over median magnitude",
    "context_kurtosis": "attention context: excess kurtosis, mean of layers",
    "context_kurtosis_attending": "attention context of queries that attend: excess kurtosis, mean of layers",
    "context_kurtosis_attending_heads": "attention context of heads that attend: excess kurtosis, mean of layers",
    "context_inf_norm": "attention context: infinity norm, largest layer",
    "context_near_zero": "attention context: entries near zero, mean of heads, %",
    "attending_share": "queries that attend, mean of heads, %",
    "attention_output_kurtosis": "attention output: excess kurtosis, mean of layers",
    "attention_output_inf_norm": "attention output: infinity norm, largest layer",
    "sink_rate_first": "sink rate of the first token, %",
    "sink_rate_any": "sink rate of any token, %",
    "sink_rate_first_renormalised": "sink rate of the first token, weights renormalised, %",
    "sink_rate_any_renormalised": "sink rate of any token, weights renormalised, %",
    "sink_rate_any_or_null": "sink rate of any token or nowhere, %",
    "sink_rate_any_above_start": "sink rate of any token, above that at step 0, %",
    "sink_rate_any_renormalised_above_start": "the same, weights renormalised, %",
    "null_mass": "null mass, mean of heads, %",
    "idle_heads": f"heads that do nothing (> {IDLE[1]:.0%} idle mass)",
    "half_idle_heads": f"heads that do little (> {IDLE[0]:.0%} idle mass)",
}
GLANCE = (
    PRIMARY,
    QUANTIZED,
    FLOAT32,
    "ffn_output_kurtosis",
    "residual_inf_norm",
    "sink_rate_any",
    "sink_rate_any_renormalised",
    "null_mass",
    "context_kurtosis",
    "context_kurtosis_attending",
)
SHARES = [key for key in METRICS if key.startswith("sink_rate") and not key.endswith("_above_start")]
SHARES += ["null_mass", "context_near_zero", "attending_share"]  # shares of each head, shown as %
# Metrics that differ between seeds by factors are compared by ratios too. {metric: the number that is added first, so
# that all values are above 0}: full kurtosis is excess kurtosis plus 3.
RATIOS = {key: 3.0 if "kurtosis" in key else 0.0 for key in METRICS if "kurtosis" in key or key.endswith("inf_norm")}


def metrics(run: Run) -> dict[str, float | None]:
    """Every metric of METRICS; None where it was not measured, for example because the model lacks the place.

    All are None for a run that diverged: it left no model to measure.
    """
    if run.diverged:
        return dict.fromkeys(METRICS)
    values = activation_metrics(run.places, run.attention)
    before = at_step_0(run)
    for key in ("sink_rate_any", "sink_rate_any_renormalised"):
        known = None not in (values[key], before.get(key))
        values[f"{key}_above_start"] = values[key] - before[key] if known else None
    schemes = run.damage["schemes"]
    values[FLOAT32] = schemes["float32"]["loss"]
    values[QUANTIZED] = schemes.get("w8a8_static", {}).get("loss")
    values |= {key: schemes.get(scheme, {}).get("gap") for key, scheme in GAPS.items()}
    return {key: values[key] for key in METRICS}


def at_step_0(run: Run) -> dict[str, float | None]:
    """The metrics of activations and attention before the first update; empty where they were not measured."""
    return activation_metrics(run.untrained["places"], run.untrained["attention"]) if run.untrained else {}


def activation_metrics(places: dict[str, dict], attention: dict[str, dict]) -> dict[str, float | None]:
    """The metrics of METRICS that come from activations and attention, without quantization.

    Args:
        places, attention: of outliers.measure_model.
    """

    def layers(place: str, statistic: str) -> list[float]:
        return [values[statistic] for name, values in places.items() if name.endswith(f".{place}")]

    def heads(statistic: str) -> list[float]:
        return [value for layer in attention.values() for value in layer.get(statistic, ())]

    def contexts(statistic: str) -> list[float]:
        """One number for each layer in which a query attends to a token."""
        return [layer[statistic] for layer in attention.values() if not np.isnan(layer.get(statistic, np.nan))]

    def percent_of(shares: list[float]) -> float:
        return 100 * np.mean(shares)

    reduced = {
        "ffn_output_kurtosis": (np.mean, layers("ffn_output", "kurtosis_sequence")),
        "ffn_output_inf_norm": (np.max, layers("ffn_output", "inf_norm")),
        "residual_kurtosis": (np.mean, layers("ffn_residual", "kurtosis_sequence")),
        "residual_inf_norm": (np.max, layers("ffn_residual", "inf_norm")),
        "residual_outliers": (percent_of, layers("ffn_residual", "outlier_share")),
        "residual_ratio": (np.mean, layers("ffn_residual", "top1_to_median")),
        "context_kurtosis": (np.mean, layers("context", "kurtosis_sequence")),
        "context_kurtosis_attending": (np.mean, contexts("context_kurtosis_attending")),
        "context_kurtosis_attending_heads": (np.mean, contexts("context_kurtosis_attending_heads")),
        "context_inf_norm": (np.max, layers("context", "inf_norm")),
        "attention_output_kurtosis": (np.mean, layers("attention_output", "kurtosis_sequence")),
        "attention_output_inf_norm": (np.max, layers("attention_output", "inf_norm")),
        **{key: (percent_of, heads(key)) for key in SHARES},
        "half_idle_heads": (lambda masses: sum(mass > IDLE[0] for mass in masses), heads("idle_mass")),
        "idle_heads": (lambda masses: sum(mass > IDLE[1] for mass in masses), heads("idle_mass")),
    }
    return {key: float(reduce(values)) if values else None for key, (reduce, values) in reduced.items()}


# -------------------------------------------------------------------------------------------------------- comparisons


@dataclass
class Finding:
    """A set of runs that agree, and the comparisons of its pairs: {arm: {metric: comparison with softmax0}}.

    An arm is missing in `compared` if in each of its pairs in `group.pairs` one run or both diverged.
    """

    group: ComparisonSet
    compared: dict[str, dict[str, Comparison]]

    @property
    def exploratory(self) -> int:
        """The number of compared arms that share an error of 5 %: all but the one named beforehand."""
        return sum(arm != PRIMARY_ARM for arm in self.compared)


def findings(runs: list[Run]) -> list[Finding]:
    """A Finding for each set with a pair, the headline's first. Sets of test runs count only if there are no others."""
    sets = comparison_sets(runs)
    return [
        Finding(group, comparisons(group))
        for group in sets
        if group.pairs and group.test_pipeline == sets[0].test_pipeline
    ]


def comparisons(group: ComparisonSet) -> dict[str, dict[str, Comparison]]:
    """{arm: {metric: comparison with softmax0}} of all arms with a pair in which no run diverged, primary arm first.

    All arms except the primary one share an error of 5 % (Bonferroni).
    """
    by_arm = {arm: pairs for arm in ordered(group) if (pairs := trained_pairs(group, arm))}
    compared: dict[str, dict[str, Comparison]] = {arm: {} for arm in by_arm}
    for arm, pairs in by_arm.items():
        tests = 1 if arm == PRIMARY_ARM else len(by_arm.keys() - {PRIMARY_ARM})
        before, after = ({seed: metrics(pair[i]) for seed, pair in pairs.items()} for i in (0, 1))
        for metric in METRICS:
            baseline, own = ({seed: values[metric] for seed, values in of_arm.items()} for of_arm in (before, after))
            if (comparison := compare(baseline, own, tests=tests)) is None:
                continue
            if metric in RATIOS:
                logs = compare_ratio(baseline, own, shift=RATIOS[metric], tests=tests)
                comparison.ratio, comparison.ratio_low, comparison.ratio_high = ratio(logs)
            if metric in GAPS:
                of_pairs = [pairs[seed] for seed in comparison.seeds]
                comparison.texts_low, comparison.texts_high = over_texts(of_pairs, GAPS[metric])
                comparison.baseline_floor, comparison.floor = (
                    noise(list(of_arm), GAPS[metric]) for of_arm in zip(*of_pairs, strict=True)
                )
            compared[arm][metric] = comparison
    return compared


def ratio(logs: Comparison | None) -> tuple[float | None, float | None, float | None]:
    """The ratio of geometric means (arm / softmax0) and its interval, from a comparison of logarithms."""
    ends = (None, None, None) if logs is None else (logs.difference, logs.low, logs.high)
    mean, low, high = (None if end is None else float(np.exp(end)) for end in ends)
    return mean, low, high


def ordered(group: ComparisonSet) -> list[str]:
    """The arms that have a pair, the primary arm first."""
    return sorted(group.pairs, key=lambda arm: arm != PRIMARY_ARM)


def trained_pairs(group: ComparisonSet, arm: str) -> dict[int, tuple[Run, Run]]:
    """{seed: pair} of the pairs in which neither run diverged."""
    return {seed: pair for seed, pair in group.pairs[arm].items() if not any(run.diverged for run in pair)}


def noise(runs: list[Run], scheme: str) -> float | None:
    """The noise of the runs' mean gap, in nats; None where the floor of a run is unknown."""
    return noise_of_mean([run.damage["schemes"][scheme].get("floor") for run in runs])


def noise_of_mean(floors: list[float | None]) -> float | None:
    """sqrt(sum of squared floors) / number of runs; None where a floor is unknown."""
    known = np.array(floors, dtype=float)  # None becomes NaN
    return float(np.sqrt((known**2).sum()) / len(known)) if np.isfinite(known).all() else None


def over_texts(pairs: list[tuple[Run, Run]], scheme: str) -> tuple[float | None, float | None]:
    """95 % bootstrap interval, over held-out texts, of the mean difference of the gaps; (None, None) without data.

    All runs have the same texts, so each bootstrap sample draws the same texts for all of them.
    """
    before, after = (mean_losses(list(of_arm), scheme) for of_arm in zip(*pairs, strict=True))
    if before is None or after is None or before["masked"] != after["masked"]:
        return None, None
    low, high = bootstrap_difference(before, after, scheme)
    return (low, high) if math.isfinite(low) else (None, None)


def mean_losses(runs: list[Run], scheme: str) -> dict | None:
    """The loss of every text in float32 and in a scheme, averaged over the runs, for bootstrap_difference.

    The averages are enough: the mean difference over any sample of texts follows from them. None where the runs were
    not scored on the same texts.
    """
    damages = [run.damage for run in runs]
    masked = damages[0].get("masked")
    if masked is None or any(damage.get("masked") != masked or scheme not in damage["texts"] for damage in damages):
        return None
    texts = {key: np.mean([damage["texts"][key] for damage in damages], axis=0) for key in ("float32", scheme)}
    return {"masked": masked, "texts": texts}


# ----------------------------------------------------------------------------------------- decisions, one function each

PERHAPS = f", though perhaps by less than the margin of {MARGIN:g} nats"
VERDICTS = {  # conclusion about the gap of static W8A8: its words
    "less": "{arm} makes quantization less harmful here",
    "more": "{arm} makes quantization more harmful here",
    "less, perhaps within the margin": "{arm} makes quantization less harmful here" + PERHAPS,
    "more, perhaps within the margin": "{arm} makes quantization more harmful here" + PERHAPS,
    "differs within the margin": f"{{arm}} differs, by less than the margin of {MARGIN:g} nats",
    "equivalent": f"{{arm}} and {BASELINE} are equivalent in what quantization costs (TOST, margin ±{MARGIN:g} nats)",
    "undecided": "undecided",
}


def excludes_zero(comparison: Comparison) -> bool:
    """Whether a difference is shown: its interval excludes 0, or the sign test, where it is used, is significant."""
    if comparison.test == SIGN_TEST:
        return comparison.p < 1 - comparison.confidence
    return comparison.low is not None and not comparison.low <= 0 <= comparison.high


def is_lower(comparison: Comparison) -> bool:
    """Whether a difference that is shown is negative."""
    return comparison.lower > comparison.higher if comparison.test == SIGN_TEST else comparison.difference < 0


def within_margin(comparison: Comparison) -> bool:
    """Equivalence: both one-sided tests reject a difference of MARGIN or more (TOST; Schuirmann 1987)."""
    return comparison.low90 is not None and -MARGIN < comparison.low90 and comparison.high90 < MARGIN


def harmless(comparison: Comparison) -> tuple[bool, bool]:
    """(softmax0, the arm): whether the interval of the arm's own mean gap ends below MARGIN."""
    uppers = (comparison.baseline_upper, comparison.upper)
    before, after = (comparison.finite and upper is not None and upper < MARGIN for upper in uppers)
    return before, after


def conclusion(comparison: Comparison) -> str:
    """How a difference in nats compares with 0 and with MARGIN: a key of VERDICTS."""
    if not excludes_zero(comparison):
        return "equivalent" if within_margin(comparison) else "undecided"
    if within_margin(comparison):
        return "differs within the margin"
    sign = "less" if is_lower(comparison) else "more"
    beyond = comparison.test == SIGN_TEST or comparison.low >= MARGIN or comparison.high <= -MARGIN
    return sign if beyond else f"{sign}, perhaps within the margin"


def direction(comparison: Comparison) -> int:
    """The direction that the verdict claims: -1 lower, 1 higher, 0 none or a difference within the margin."""
    return {"less": -1, "more": 1}.get(conclusion(comparison).partition(",")[0], 0)


def verdict(comparison: Comparison, arm: str) -> str:
    """What is concluded about the gap of static W8A8, without figures."""
    return VERDICTS[conclusion(comparison)].format(arm=arm)


def rescue(comparison: Comparison, arm: str, group: ComparisonSet) -> str:
    """The beginning of a sentence, which says that there is nothing to rescue; empty where there may be something.

    An arm with a run that diverged, in a pair or not, never counts as unharmed, because its worst run has no model
    that could be quantized.
    """
    lost = {run.arm for run in group.runs if run.diverged}
    baseline, other = harmless(comparison)
    if not baseline or BASELINE in lost:
        return ""
    ends = f"upper end of the {percent(comparison.confidence)} interval of its mean gap under {MARGIN:g} nats"
    if other and arm not in lost:
        return f"there is nothing to rescue, quantization harms neither {BASELINE} nor {arm} (of each, {ends}); "
    return f"there is nothing to rescue in {BASELINE} ({ends}); "


def retraction(gap: Comparison, loss: Comparison | None, arm: str) -> str:
    """The end of a sentence, which limits the verdict on the gap by comparing the losses of the quantized models."""
    claimed = direction(gap)
    if loss is None or not (claimed or excludes_zero(loss)):
        return ""
    if not excludes_zero(loss):
        no, lower = ("no better", "lower") if claimed < 0 else ("no worse", "higher")
        return f", but the quantized model is {no} (its loss is not shown to be {lower})"
    if claimed == (-1 if is_lower(loss) else 1):
        return ""
    whose = "" if claimed else f" with {arm}"
    return f", but the quantized model is {'better' if is_lower(loss) else 'worse'}{whose}"


def failed_check(group: ComparisonSet) -> str:
    """The whole answer where the instrument failed its own check on a run of the set; otherwise empty."""
    failed = [run.name for run in group.runs if run.damage.get("self_check", {}).get("passed") is False]
    if not failed:
        return ""
    return (
        f"None: the instrument failed its own check on {', '.join(failed)}, so no figure of quantization in this set "
        "may be used."
    )


def undecided_check(group: ComparisonSet) -> list[str]:
    """A sentence for the case that the positive control is undecided on every checked run of the set; else none."""
    checks = [run.damage["self_check"]["passed"] for run in group.runs if "self_check" in run.damage]
    if not checks or any(passed is not None for passed in checks):
        return []
    return [
        "The positive control is undecided on these models: they have learnt too little that quantization could "
        "destroy."
    ]


def few_pairs(comparison: Comparison) -> str:
    if comparison.pairs != 2 or comparison.low is None:
        return ""
    t = scipy.stats.t.ppf(1 - (1 - comparison.confidence) / 2, 1)
    return f", from two pairs only (t = {t:.1f})"


# -------------------------------------------------------------------------------------------------- the answer in words


def interval(comparison: Comparison) -> str:
    """The interval of the difference, in words."""
    said = f"{percent(comparison.confidence)} interval from {ends(comparison.low, comparison.high)}"
    return no_interval(comparison) or said


def equivalence(comparison: Comparison) -> str:
    """The interval of the equivalence test, in words."""
    level = percent(1 - 2 * (1 - comparison.confidence))
    return f"for equivalence: {level} interval from {ends(comparison.low90, comparison.high90)}"


def brackets(comparison: Comparison, more: str = "") -> str:
    """The interval of the difference, in brackets; none of one pair."""
    return "" if comparison.pairs == 1 else f" ({interval(comparison)}{more})"


def losses(metric: dict[str, Comparison], arm: str) -> str:
    """The losses of both arms after quantization and before it, in words."""
    said = []
    for key, label in ((QUANTIZED, "loss after quantization"), (FLOAT32, "loss in float32")):
        if (comparison := metric.get(key)) is not None and comparison.finite:
            said.append(
                f"{label}: {arm} {spread(comparison.mean, comparison.std)} nats, {BASELINE} "
                f"{spread(comparison.baseline_mean, comparison.baseline_std)}, "
                f"difference {figure(comparison.difference)}{brackets(comparison)}"
            )
        elif comparison is not None:
            said.append(f"{label}: {interval(comparison)}")
    return "; ".join(said)


def failures(comparison: Comparison, arm: str) -> list[str]:
    """For each arm with a loss after quantization that is not finite: the number of such pairs, and their seeds."""
    said = []
    for name, lost in ((BASELINE, comparison.baseline_not_finite), (arm, comparison.not_finite)):
        if lost:
            listed = ", ".join(map(str, lost))
            pairs = "the one pair" if comparison.pairs == 1 else f"{len(lost)} of {comparison.pairs} pairs"
            said.append(f"{name}'s loss after quantization is not finite in {pairs} (seed {listed})")
    return said


def divergences(arm: str, group: ComparisonSet) -> str:
    """A sentence about the runs of both arms that diverged in training; empty where none did.

    A divergence in training is no damage by quantization. It has an exact two-sided sign test of its own, over the
    pairs in which one arm diverged and the other did not.
    """
    lost = [run for run in group.runs if run.diverged and run.arm in (BASELINE, arm)]
    if not lost:
        return ""
    pairs = list(group.pairs[arm].values())
    before, after = (sum(pair[i].diverged for pair in pairs) for i in (0, 1))
    alone = sum(pair[0].diverged and not pair[1].diverged for pair in pairs)
    one_arm = sum(pair[0].diverged != pair[1].diverged for pair in pairs)
    p = scipy.stats.binomtest(alone, one_arm).pvalue if one_arm else 1.0
    test = f": sign test p = {p:.2g}" if len(pairs) > 1 and before + after else ""
    of = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
    listed = "; ".join(
        f"seed {run.results['seed']}{'' if any(run in pair for pair in pairs) else ', without a pair'}: {run.arm} "
        f"{run.ending}"
        for run in lost
    )
    return (
        f" {capital(BASELINE)} diverged in training in {before} of {of}, {arm} in {after}, before any "
        f"quantization{test} ({listed})."
    )


def costs(comparison: Comparison, arm: str) -> str:
    said = [
        f"an amount {below} nats" if (below := below_noise(mean, floor)) else f"{spread(mean, std)}{unit}"
        for mean, std, floor, unit in (
            (comparison.mean, comparison.std, comparison.floor, " nats"),
            (comparison.baseline_mean, comparison.baseline_std, comparison.baseline_floor, ""),
        )
    ]
    return f"static W8A8 quantization costs {arm} {said[0]} of held-out loss, {BASELINE} {said[1]}"


def size(count: int, arm: str, group: ComparisonSet) -> str:
    """How many pairs of how many steps a sentence is about."""
    said = "one pair" if count == 1 else f"{count} pairs"
    if not all(run.diverged for run in group.runs):  # runs that diverged did not complete their steps
        said += f" of {group.steps:,} steps"
    if 0 < count < len(trained_pairs(group, arm)):
        return f"{said} in which it was measured"
    return said + (" in which both arms were trained" if 0 < count < len(group.pairs[arm]) else "")


def texts(comparison: Comparison) -> str:
    if comparison.texts_low is None:
        return ""
    only = ", this pair only" if comparison.pairs == 1 else ""
    return f"95% interval over texts{only}: {ends(comparison.texts_low, comparison.texts_high)}"


def one_pair(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """The sentences about a single pair: its figures, without a test."""
    comparison = metric[PRIMARY]
    begin = f"Open: {size(1, arm, group)} (seed {comparison.seeds[0]}), no test"
    if not comparison.finite:
        sentence = ". ".join([begin, *failures(comparison, arm), losses(metric, arm)])
    else:
        sure = f" ({texts(comparison)})" if texts(comparison) else ""
        difference = f"a difference of {figure(comparison.difference)} nats{sure}"
        sentence = f"{begin}. In it {costs(comparison, arm)}, {difference}; {losses(metric, arm)}"
    return f"{sentence}. Nothing can be concluded about {arm} beyond this pair."


def by_sign(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """The sentences about several pairs, at least one of which has a loss that is not finite."""
    comparison = metric[PRIMARY]
    decided = comparison.lower + comparison.higher
    least = f"; {decided} pairs cannot give less than p = {min(1, 2 * 0.5**decided):.2g}" if decided else ""
    ties = f", {comparison.ties} tied and left out" if comparison.ties else ""
    said = (
        f"{capital(verdict(comparison, arm))}{retraction(comparison, metric.get(QUANTIZED), arm)}, over "
        f"{size(comparison.pairs, arm, group)}: {'; '.join(failures(comparison, arm))}. A loss that is not finite "
        "counts as worse than every finite one: static W8A8 quantization costs "
        f"{arm} less than {BASELINE} in {comparison.lower} of "
        f"{comparison.pairs} pairs and more in {comparison.higher}{ties} ({SIGN_TEST}, p = {comparison.p:.2g}{least})."
    )
    return f"{said} {capital(losses(metric, arm))}."


def by_mean(metric: dict[str, Comparison], arm: str, group: ComparisonSet) -> str:
    """The sentences about several pairs with finite losses."""
    comparison = metric[PRIMARY]
    retracted = retraction(comparison, metric.get(QUANTIZED), arm)
    said = rescue(comparison, arm, group) + verdict(comparison, arm) + retracted + few_pairs(comparison)
    sure = interval(comparison)
    if comparison.low is not None:
        sure += f", {comparison.test}, p = {comparison.p:.2g}"
    if conclusion(comparison) == "equivalent":  # by an interval of its own, which lies within the margin
        sure += f"; {equivalence(comparison)}"
    sentence = (
        f"{capital(said)}: over {size(comparison.pairs, arm, group)} {costs(comparison, arm)} "
        f"(mean ± standard deviation over seeds), a difference of {figure(comparison.difference)} nats ({sure})"
    )
    sentence = "; ".join(part for part in (sentence, texts(comparison), losses(metric, arm)) if part) + "."
    if verdict(comparison, arm) == "undecided" and comparison.detectable is not None:
        effect = f"a true difference of {figure(comparison.detectable)} nats in {POWER:.0%} of cases"
        sentence += f" With this spread, {comparison.pairs} pairs would show {effect}."
    return sentence


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def of_arm(finding: Finding, arm: str) -> str:
    """The sentences about one arm."""
    group = finding.group
    metric = finding.compared.get(arm, {})
    lost = divergences(arm, group)
    if not metric:
        return f"None about {arm}: both arms were trained in 0 of {size(len(group.pairs[arm]), arm, group)}.{lost}"
    if PRIMARY not in metric:
        of = size(len(trained_pairs(group, arm)), arm, group)
        return f"None about {arm}: static W8A8 quantization was not measured in a pair ({of}).{lost}"
    comparison = metric[PRIMARY]
    describe = one_pair if comparison.pairs == 1 else by_mean if comparison.finite else by_sign
    said = describe(metric, arm, group) + lost
    if arm == PRIMARY_ARM:
        return said
    others = finding.exploratory
    corrected = f" (Intervals and tests corrected for {others} exploratory arms, Bonferroni.)" if others > 1 else ""
    return f"Exploratory: {said}{corrected}"


def of_set(finding: Finding, others: list[str] | None = None) -> list[str]:
    """A paragraph for each arm of a set, then `others`; no verdict where the instrument failed on the set."""
    if failed := failed_check(finding.group):
        return [failed]
    said = [of_arm(finding, arm) for arm in ordered(finding.group)]
    if PRIMARY_ARM not in finding.group.pairs:
        said.insert(0, f"None about {PRIMARY_ARM}, the arm named beforehand: it has no pair here.")
    return [*said, *(others or []), *undecided_check(finding.group)]


def trained_on_more(runs: list[Run], group: ComparisonSet) -> list[str]:
    """A sentence for every run outside the set that was trained on more sequences and has no pair."""
    said = []
    for other in comparison_sets(runs):
        paired = in_a_pair(other)
        for run in other.runs:
            steps, batch = run.results["training"]["steps"], run.results["effective_batch_size"]
            if other.test_pipeline or run in paired or run in group.runs or steps * batch <= group.samples:
                continue
            said.append(
                f"{run.name} was trained on more ({steps:,} steps of {batch:,} sequences), but has no pair: it is not "
                "compared."
            )
    return said


def answer(runs: list[Run], all_findings: list[Finding]) -> list[str]:
    """Paragraphs: the answer from the headline's set, then from every other set with a pair; or why there is none."""
    trained = [run for run in runs if run.results]
    if trained and all(run.results["test_pipeline"] for run in trained):
        return ["None: --test_pipeline made these runs, which show that the pipeline works, and nothing else."]
    if not all_findings:
        return [
            f"None: there is no pair here, that is, a run of {BASELINE} and one of another n with the same seed, text, "
            "tokenizer, steps and settings."
        ]
    first = all_findings[0].group
    if failed := failed_check(first):
        return [failed]
    said = of_set(all_findings[0], trained_on_more(runs, first))
    for other in all_findings[1:]:
        begins, *rest = of_set(other)
        said += [f"Another set of {len(other.group.runs)} runs of {other.group.steps:,} steps: {begins}", *rest]
    return said
