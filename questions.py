"""One sentence for each question about softmax1, each from its own interval: sinks, outliers, held-out loss, INT8.

DEFINITIONS.md ("One sentence for each question") has the rules; each rule is a function here. INT8 is the primary
question, and answer.py says more about it. The others are secondary: their intervals share an error of 5 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from answer import (
    FLOAT32,
    MARGIN,
    PERHAPS,
    PRIMARY,
    PRIMARY_ARM,
    QUANTIZED,
    RATIOS,
    Finding,
    at_step_0,
    brackets,
    capital,
    conclusion,
    costs,
    direction,
    divergences,
    equivalence,
    excludes_zero,
    failed_check,
    failures,
    few_pairs,
    is_lower,
    metrics,
    rescue,
    retraction,
    size,
    trained_pairs,
    undecided_check,
    verdict,
    within_margin,
)
from outliers import NEAR_ZERO, OUTLIER, SHORT, SINK
from pairs import Comparison, compare, compare_ratio, no_interval, percent
from record import look_up
from sets import BASELINE
from tables import ends, figure, number, spread

SECONDARY = 4  # intervals: sinks, infinity norm, kurtosis, held-out loss
EXPLAINING = 3  # intervals that explain the context's kurtosis: exploratory, they share another error of 5 %
SINKS = ("sink_rate_any", "sink_rate_any_renormalised")  # in the order in which `sinks` tests them
NORM, KURTOSIS = "residual_inf_norm", "ffn_output_kurtosis"
CONTEXT, ATTENDS = "context_kurtosis", "context_kurtosis_attending"

# Below these bounds an arm has nothing that could be removed. They were fixed before any pair was completely trained.
NO_SINKS = 1.0  # % of heads and texts (above step 0, where that is known)
NO_OUTLIERS = {  # of geometric means
    NORM: OUTLIER,  # no entry is an outlier of Dettmers et al. 2022
    KURTOSIS: 3.0 + RATIOS[KURTOSIS],  # excess kurtosis of 3, that of a Laplace distribution
}

LABELS = {
    "sinks": "Sinks",
    "outliers": "Outliers",
    "held_out_loss": "Held-out loss",
    "int8": "INT8, the primary question",
    "explanation": "Why the kurtosis of the attention context changes",
}
REMOVAL = {  # kind of conclusion: sentence about what softmax1 is to remove
    "removed": "{arm} removes {what}",
    "reduced": "{arm} reduces {what}",
    "increased": "{arm} increases {what}",
    "nothing to remove": "{baseline} has no {what} that could be removed",
    "nothing in either arm": "neither {baseline} nor {arm} has {what}, so there is nothing to remove",
    "undecided": "whether {arm} removes {what} cannot be said",
}
LOSS_KINDS = {  # conclusion about a difference of losses: kind of conclusion about held-out loss
    "equivalent": "kept",
    "differs within the margin": "kept",
    "less": "better",
    "more": "worse",
    "less, perhaps within the margin": "better, perhaps within the margin",
    "more, perhaps within the margin": "worse, perhaps within the margin",
    "undecided": "undecided",
}
ONE_PAIR = "one pair"
NOT_MEASURED = "not measured"


@dataclass
class Answered:
    """The answer to a question."""

    said: str  # a sentence
    kinds: dict[str, str]  # {metric: kind of conclusion about it}
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # of logarithms for the metrics in RATIOS


@dataclass
class Pairs:
    """The pairs of softmax0 and softmax1 in one set in which neither run diverged."""

    finding: Finding
    before: dict[int, dict[str, float | None]]  # {seed: metrics} of softmax0
    after: dict[int, dict[str, float | None]]
    started: list[dict[str, float | None]]  # metrics of every run at step 0; empty where they were not measured

    def compare(self, key: str, tests: int = SECONDARY) -> Comparison | None:
        """Compare a metric; None where it was not measured, or is NaN because no entry belongs to it."""
        before, after = (
            {seed: _known(values[key]) for seed, values in arm.items()} for arm in (self.before, self.after)
        )
        if key in RATIOS:
            return compare_ratio(before, after, shift=RATIOS[key], tests=tests)
        return compare(before, after, tests=tests)

    def at_start(self, key: str) -> float | None:
        """Mean of a metric over the runs of both arms at step 0; the geometric mean for the metrics in RATIOS."""
        values = [metrics_of_run.get(key) for metrics_of_run in self.started]
        if None in values or not np.isfinite(values).all():
            return None
        return float(np.exp(np.log(np.add(values, RATIOS[key])).mean()) if key in RATIOS else np.mean(values))


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def questions(all_findings: list[Finding]) -> dict[str, Answered]:
    """{key of LABELS: answer} of the headline's set; empty where no pair of softmax1 was trained, and of test runs."""
    if not all_findings or all_findings[0].group.test_pipeline or PRIMARY_ARM not in all_findings[0].compared:
        return {}
    pairs = trained_pairs(all_findings[0].group, PRIMARY_ARM)
    runs = [run for pair in pairs.values() for run in pair]
    before, after = ({seed: metrics(pair[i]) for seed, pair in pairs.items()} for i in (0, 1))
    both = Pairs(all_findings[0], before, after, [at_step_0(run) for run in runs])
    asked = (sinks, outliers, held_out_loss, int8, explanation)
    return {key: ask(both) for key, ask in zip(LABELS, asked, strict=True)}


# --------------------------------------------------------------------------------------------- decisions, one each


def removal(comparison: Comparison | None, bound: float) -> str:
    """The conclusion about sinks or outliers, which softmax1 should remove: a key of REMOVAL, ONE_PAIR or NOT_MEASURED.

    Args:
        comparison: of a metric, or of its logarithms.
        bound: on the same scale; an arm has nothing to remove if the interval of its own mean ends below it.
    """
    if comparison is None:
        return NOT_MEASURED
    if comparison.pairs == 1:
        return ONE_PAIR
    before, after = surely_below(comparison, bound)
    if before and after:
        return "nothing in either arm"
    if excludes_zero(comparison) and not is_lower(comparison):
        return "increased"
    if before:
        return "nothing to remove"
    if excludes_zero(comparison):
        return "removed" if after else "reduced"
    return "undecided"


def surely_below(comparison: Comparison, bound: float) -> tuple[bool, bool]:
    """(softmax0, softmax1): whether the interval of the arm's own mean ends below the bound.

    An arm whose values are all equal (no seed has a sink, for example) has no interval: then the value itself counts.
    """
    if not comparison.finite:
        return False, False
    own = ((comparison.baseline_mean, comparison.baseline_upper), (comparison.mean, comparison.upper))
    before, after = ((mean if upper is None else upper) < bound for mean, upper in own)
    return before, after


def keeping(comparison: Comparison | None, diverged: bool) -> str:
    """The conclusion about held-out loss: kept, worse, better (perhaps within the margin) or undecided.

    Undecided where a run diverged in training: it has no loss, and the other runs of its arm cannot represent it.
    """
    if comparison is None:
        return NOT_MEASURED
    if comparison.pairs == 1:
        return ONE_PAIR
    return "undecided" if diverged else LOSS_KINDS[conclusion(comparison)]


def rescued(comparison: Comparison, rescues: str) -> str:
    """The kind of conclusion about the primary metric, in agreement with the verdict of answer.py."""
    if comparison.pairs == 1:
        return ONE_PAIR
    if claimed := direction(comparison):
        return "less harmful" if claimed < 0 else "more harmful"
    return "nothing to rescue" if rescues else conclusion(comparison)


def explained(whole: Comparison | None, attending: Comparison | None, rest: Comparison | None) -> str:
    """Whether queries whose attention goes nowhere explain that the context has a higher kurtosis with softmax1.

    Args:
        whole: comparison of the logarithm of the context's kurtosis.
        attending: the same of the queries that attend.
        rest: comparison of the difference of these two logarithms.
    """
    if whole is None or attending is None or rest is None:
        return NOT_MEASURED
    if whole.pairs == 1:
        return ONE_PAIR
    if not excludes_zero(whole):
        return "no rise shown"
    if is_lower(whole):
        return "nothing to explain"
    smaller = excludes_zero(rest) and is_lower(rest)
    still = excludes_zero(attending) and not is_lower(attending)
    if smaller:
        return "in part" if still else "supported"
    return "not supported" if still else "undecided"


# ------------------------------------------------------------------------------------------------------- sentences


def sinks(pairs: Pairs) -> Answered:
    """Sink rate of any token, minus that at step 0 where it is known, in two ways.

    The first rate is of all attention, as Gu et al. define a sink. The second is of the attention that goes to tokens:
    the null slot lowers the share of every token, so only this rate compares tokens with each other. It is tested only
    where the first difference is shown (a fixed sequence of tests, which needs no further correction).
    """
    metrics_of_runs = [*pairs.before.values(), *pairs.after.values()]
    known = None not in [of_run[f"{key}_above_start"] for key in SINKS for of_run in metrics_of_runs]
    first, second = ((f"{key}_above_start" if known else key) for key in SINKS)
    raw, shares = pairs.compare(first), pairs.compare(second)
    if raw is None or shares is None:
        said = f"The sink rates were not measured (they need texts of at least {SHORT} tokens)."
        return Answered(said, {SINKS[0]: NOT_MEASURED})
    kinds = {SINKS[0]: removal(raw, NO_SINKS)}
    also = ""
    if kinds[SINKS[0]] in ("removed", "reduced"):
        kinds[SINKS[1]] = removal(shares, NO_SINKS)
        also = {
            "removed": ", also among the attention that tokens get at all",
            "reduced": ", also among the attention that tokens get at all",
            "increased": ", but increases them among the attention that tokens get at all",
        }.get(kinds[SINKS[1]], ", but that is not shown among the attention that tokens get at all")
    above = f"minus that share at step 0 ({figure(pairs.at_start(SINKS[0]))} %)" if known else "step 0 is not known"
    sentence = (
        f"{opening(kinds[SINKS[0]], raw, 'attention sinks')}{also}: share of heads and texts in which one token gets "
        f"more than {SINK:.0%} of the attention, {above}: {points(raw)}; with every query's weights divided by their "
        f"sum, {points(shares)}; {seen(raw, pairs)}."
    )
    return Answered(capital(sentence), kinds, {first: raw, second: shares})


def outliers(pairs: Pairs) -> Answered:
    """Infinity norm of the residual stream and kurtosis of the FFN output, with a conclusion about each."""
    said, kinds, compared = [], {}, {}
    for key, what, where in (
        (NORM, "outliers (infinity norm of the residual stream)", "largest layer"),
        (KURTOSIS, "outliers (kurtosis of the FFN output)", "full kurtosis, 3 of a Gaussian, mean of layers"),
    ):
        comparison = pairs.compare(key)
        kinds[key] = removal(comparison, math.log(NO_OUTLIERS[key]))
        if comparison is None:
            said.append(f"{what}: not measured")
            continue
        start = f", {figure(step_0)} at step 0" if (step_0 := pairs.at_start(key)) is not None else ""
        said.append(f"{opening(kinds[key], comparison, what)}: {where}, {factor(comparison)}{start}")
        compared[key] = comparison
    first = next(iter(compared.values()), None)
    said.append(seen(first, pairs))
    return Answered(f"{capital('; '.join(said))}.", kinds, compared)


def held_out_loss(pairs: Pairs) -> Answered:
    comparison = pairs.compare(FLOAT32)
    kind = keeping(
        comparison, any(run.diverged and run.arm in (BASELINE, PRIMARY_ARM) for run in pairs.finding.group.runs)
    )
    if comparison is None:
        return Answered("The held-out loss was not measured.", {FLOAT32: kind})
    perhaps = PERHAPS if kind.endswith("margin") else ""
    phrase = {
        "kept": f"{PRIMARY_ARM} keeps held-out loss",
        "worse": f"{PRIMARY_ARM} makes held-out loss worse{perhaps}",
        "better": f"{PRIMARY_ARM} makes held-out loss better{perhaps}",
        "undecided": f"whether {PRIMARY_ARM} keeps held-out loss cannot be said",
        ONE_PAIR: only(comparison),
    }[kind.partition(",")[0]]
    tost = ""
    if comparison.low90 is not None:
        inside = "inside" if within_margin(comparison) else "not inside"
        tost = f"; {equivalence(comparison)}, {inside} the margin of ±{MARGIN:g}"
    before, after = losses(comparison.baseline_mean, comparison.baseline_std), losses(comparison.mean, comparison.std)
    said = (
        f"{capital(phrase)}{few_pairs(comparison)}: {PRIMARY_ARM} {after} nats in float32, {BASELINE} {before}, "
        f"difference {figure(comparison.difference)}{brackets(comparison, tost)}; {seen(comparison, pairs)}."
    )
    return Answered(said + divergences(PRIMARY_ARM, pairs.finding.group), {FLOAT32: kind}, {FLOAT32: comparison})


def int8(pairs: Pairs) -> Answered:
    """The primary question in one sentence; answer.py has all conclusions about it."""
    group, metric = pairs.finding.group, pairs.finding.compared[PRIMARY_ARM]
    comparison = metric.get(PRIMARY)
    if failed := failed_check(group):
        return Answered(failed, {PRIMARY: "failed check"})
    if comparison is None:
        return Answered("Static W8A8 quantization was not measured in a pair.", {PRIMARY: NOT_MEASURED})
    rescues = rescue(comparison, PRIMARY_ARM, group) if comparison.pairs > 1 else ""
    kind = rescued(comparison, rescues)
    if kind == ONE_PAIR:
        phrase = only(comparison)
    else:
        concluded = verdict(comparison, PRIMARY_ARM)
        if concluded == "undecided":
            asked = "the arms differ" if rescues else f"{PRIMARY_ARM} rescues INT8"
            concluded = f"whether {asked} cannot be said"
        phrase = f"{rescues}{concluded}{retraction(comparison, metric.get(QUANTIZED), PRIMARY_ARM)}"
    figures = "; ".join(failures(comparison, PRIMARY_ARM)) or (
        f"{costs(comparison, PRIMARY_ARM)}, a difference of {figure(comparison.difference)} nats"
    )
    said = f"{capital(phrase)}{few_pairs(comparison)}: {figures}{brackets(comparison)}; {seen(comparison, pairs)}."
    return Answered(" ".join([said, *undecided_check(group)]), {PRIMARY: kind}, {PRIMARY: comparison})


def explanation(pairs: Pairs) -> Answered:
    """Whether the context's kurtosis is higher because its entries are near zero where attention goes nowhere."""
    whole, attending = (pairs.compare(key, EXPLAINING) for key in (CONTEXT, ATTENDS))
    before, after = (
        {seed: _log_ratio(values[ATTENDS], values[CONTEXT]) for seed, values in arm.items()}
        for arm in (pairs.before, pairs.after)
    )
    rest = compare(before, after, tests=EXPLAINING)
    kind = explained(whole, attending, rest)
    if kind == NOT_MEASURED:
        return Answered("The kurtosis of the attention context was not measured.", {CONTEXT: kind})
    nulled = "queries whose attention goes nowhere"
    phrase = {
        "undecided": f"whether {nulled} explain the higher kurtosis of the attention context cannot be said",
        "no rise shown": f"that {PRIMARY_ARM} raises the kurtosis of the attention context is not shown",
        "nothing to explain": f"the kurtosis of the attention context is lower with {PRIMARY_ARM}: nothing to explain",
        "supported": f"{nulled} explain the higher kurtosis of the attention context with {PRIMARY_ARM}",
        "in part": f"{nulled} explain the higher kurtosis of the attention context with {PRIMARY_ARM} in part",
        "not supported": (
            f"that {nulled} explain the higher kurtosis of the attention context with {PRIMARY_ARM} is not supported"
        ),
        ONE_PAIR: only(whole),
    }[kind]
    said = (
        f"{capital(phrase)}{few_pairs(whole)}: full kurtosis, mean of layers, {factor(whole)}; of only the (query, "
        f"head) pairs that attend, {factor(attending)}; the second ratio over the first: {times(rest)}{facts(pairs)}; "
        f"{seen(whole, pairs)}."
    )
    compared = {CONTEXT: whole, ATTENDS: attending, f"{ATTENDS}_over_{CONTEXT}": rest}
    return Answered(said, {CONTEXT: kind}, compared)


def _log_ratio(above: float | None, below: float | None) -> float | None:
    """The logarithm of the ratio of two full kurtoses, given as excess kurtoses; None where one was not measured."""
    if _known(above) is None or _known(below) is None or min(above, below) <= -3:
        return None
    return math.log(above + 3) - math.log(below + 3)


def facts(pairs: Pairs) -> str:
    """Further figures of both arms, on which the explanation rests; they are not tested."""
    said = ""
    for key, what in (
        ("attending_share", "(query, head) pairs that attend"),
        ("context_near_zero", f"entries near zero (at most {NEAR_ZERO:.0%} of the root mean square)"),
    ):
        if (comparison := pairs.compare(key)) is not None:
            said += (
                f"; {what}, {PRIMARY_ARM} {figure(comparison.mean)} %, {BASELINE} {figure(comparison.baseline_mean)} %"
            )
    if (comparison := pairs.compare("context_inf_norm")) is not None:
        said += f"; infinity norm, largest layer, {factor(comparison, sure=False)}"
    return said


# ----------------------------------------------------------------------------------------------- parts of a sentence


def opening(kind: str, comparison: Comparison, what: str) -> str:
    if kind == ONE_PAIR:
        return f"{only(comparison)} about {what}"
    said = REMOVAL[kind].format(arm=PRIMARY_ARM, baseline=BASELINE, what=what)
    return f"{said}{few_pairs(comparison)}"


def only(comparison: Comparison) -> str:
    return f"open, from one pair (seed {comparison.seeds[0]}) nothing is concluded"


def points(comparison: Comparison) -> str:
    """A rate in both arms, in percent, and the difference in percentage points."""
    return (
        f"{PRIMARY_ARM} {spread(comparison.mean, comparison.std)} %, "
        f"{BASELINE} {spread(comparison.baseline_mean, comparison.baseline_std)} %, "
        f"difference {figure(comparison.difference)} points{brackets(comparison)}"
    )


def factor(comparison: Comparison, sure: bool = True) -> str:
    """The geometric means of both arms and their ratio, from a comparison of logarithms; `sure` adds its interval."""
    if not comparison.finite:
        return no_interval(comparison)
    after, before = (figure(math.exp(mean)) for mean in (comparison.mean, comparison.baseline_mean))
    ratio = times(comparison) if sure else figure(math.exp(comparison.difference))
    return f"{PRIMARY_ARM} {after}, {BASELINE} {before}, ratio {ratio}"


def times(comparison: Comparison) -> str:
    """A ratio and its interval, from a comparison of logarithms."""
    if not comparison.finite:
        return no_interval(comparison)
    ratio = figure(math.exp(comparison.difference))
    if comparison.pairs == 1:
        return ratio
    if comparison.low is None:
        return f"{ratio} ({no_interval(comparison)})"
    sure = ends(math.exp(comparison.low), math.exp(comparison.high))
    return f"{ratio} ({percent(comparison.confidence)} interval from {sure})"


def losses(mean: float | None, std: float | None) -> str:
    """A mean loss with four decimals, enough to see the margin."""
    return number(mean, 4) + ("" if std is None else f" ± {number(std, 4)}")


def seen(comparison: Comparison | None, pairs: Pairs) -> str:
    """The scale of the experiment behind a sentence: pairs, steps, parameters, tokens."""
    over = size(comparison.pairs if comparison else len(pairs.before), PRIMARY_ARM, pairs.finding.group)
    run = next(iter(trained_pairs(pairs.finding.group, PRIMARY_ARM).values()))[0]
    counts = {"parameters": "model.parameters", "tokens a run": "training.tokens"}
    known = {what: look_up(run.results, key, None) for what, key in counts.items()}
    scale = [f"{shorter(count)} {what}" for what, count in known.items() if count]
    return f"over {over}" + (f" ({', '.join(scale)})" if scale else "")


def shorter(count: int) -> str:
    """A count in a few characters: 5.3M, 84M, 420k."""
    for size_of, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size_of:
            return f"{count / size_of:.{1 if count < 10 * size_of else 0}f}{letter}"
    return str(count)
