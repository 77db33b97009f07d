"""One sentence for each question about softmax1, each from its own interval: sinks, outliers, held-out loss, INT8.

The rules stand in DEFINITIONS.md ("One sentence for each question"); a function here decides each. INT8 is the primary
question, of which answer.py says more. The others are secondary and share an error of 5 % among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from answer import (
    FLOAT32,
    MARGIN,
    PRIMARY,
    PRIMARY_ARM,
    QUANTIZED,
    RATIOS,
    Finding,
    at_step_0,
    beyond_margin,
    capital,
    costs,
    direction,
    divergences,
    failed_check,
    failures,
    few_pairs,
    interval,
    less,
    metrics,
    rescue,
    retraction,
    shown,
    size,
    trained_pairs,
    undecided_check,
    verdict,
    within_margin,
)
from outliers import NEAR_ZERO, OUTLIER, SHORT, SINK
from pairs import SIGN_TEST, Comparison, compare, compare_ratio, no_interval, percent
from record import look_up
from runs import Run
from sets import BASELINE
from tables import figure, number, spread

SECONDARY = 4  # intervals: sinks, infinity norm, kurtosis, held-out loss
EXPLAINING = 3  # intervals of the explanation of the context's kurtosis: exploratory, an error of 5 % by themselves
SINKS = ("sink_rate_any", "sink_rate_any_renormalised")  # in this order: see `sinks`
NORM, KURTOSIS = "residual_inf_norm", "ffn_output_kurtosis"
CONTEXT, ATTENDS = "context_kurtosis", "context_kurtosis_attending"

# Below these an arm has nothing that could be removed. Stated before any pair was trained to the end.
NO_SINKS = 1.0  # % of heads and texts (above step 0, where that is known)
NO_OUTLIERS = {  # of geometric means
    NORM: OUTLIER,  # no entry is an outlier of Dettmers et al. 2022
    KURTOSIS: 3.0 + RATIOS[KURTOSIS],  # excess kurtosis 3: the tails of a Laplace distribution
}

LABELS = {
    "sinks": "Sinks",
    "outliers": "Outliers",
    "held_out_loss": "Held-out loss",
    "int8": "INT8, the primary question",
    "explanation": "Why the kurtosis of the attention context changes",
}
REMOVAL = {  # kind: what is said of `what`
    "removed": "{arm} removes {what}",
    "reduced": "{arm} reduces {what}",
    "increased": "{arm} increases {what}",
    "nothing to remove": "{baseline} has no {what} that could be removed",
    "nothing in either arm": "neither {baseline} nor {arm} has {what}, so there is nothing to remove",
    "undecided": "whether {arm} removes {what} cannot be said",
}
ONE_PAIR = "one pair"
NOT_MEASURED = "not measured"


@dataclass
class Answered:
    """A sentence, what it concludes ({of what: kind}), and the comparisons that it comes from.

    Comparisons of the keys in RATIOS are of logarithms (pairs.compare_ratio).
    """

    said: str
    kinds: dict[str, str]
    comparisons: dict[str, Comparison] = field(default_factory=dict)


@dataclass
class Pairs:
    """The pairs of softmax0 and softmax1 in one set in which both were trained."""

    finding: Finding
    before: dict[int, dict[str, float | None]]  # {seed: metrics} of softmax0
    after: dict[int, dict[str, float | None]]
    started: list[dict[str, float | None]]  # metrics of every run at step 0; empty where that model is not known

    def compare(self, key: str, tests: int = SECONDARY) -> Comparison | None:
        """Of a metric; None where it was not measured. NaN: there was nothing to measure it on."""
        both = [{seed: _known(values[key]) for seed, values in arm.items()} for arm in (self.before, self.after)]
        if key in RATIOS:
            return compare_ratio(*both, shift=RATIOS[key], tests=tests)
        return compare(*both, tests=tests)

    def at_start(self, key: str) -> float | None:
        """Mean of a metric over the runs of both arms at step 0, the geometric one of those in RATIOS."""
        values = [one.get(key) for one in self.started]
        if None in values or not np.isfinite(values).all():
            return None
        return float(np.exp(np.log(np.add(values, RATIOS[key])).mean()) if key in RATIOS else np.mean(values))


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def questions(found: list[Finding]) -> dict[str, Answered]:
    """{key of LABELS: answer} of the headline's set; empty where no pair of softmax1 was trained, and of test runs."""
    if not found or found[0].group.test_pipeline or PRIMARY_ARM not in found[0].compared:
        return {}
    pairs = trained_pairs(found[0].group, PRIMARY_ARM)
    runs = [run for pair in pairs.values() for run in pair]
    them = Pairs(
        found[0],
        *({seed: metrics(pair[i]) for seed, pair in pairs.items()} for i in (0, 1)),
        [at_step_0(run) for run in runs],
    )
    asked = {
        "sinks": sinks,
        "outliers": outliers,
        "held_out_loss": held_out_loss,
        "int8": int8,
        "explanation": explanation,
    }
    return {key: ask(them) for key, ask in asked.items()}


# --------------------------------------------------------------------------------------------- decisions, one each


def removal(one: Comparison | None, bound: float) -> str:
    """What is shown of something that softmax1 is to remove: a key of REMOVAL, ONE_PAIR or NOT_MEASURED.

    Args:
        one: of a metric, or of its logarithms.
        bound: on the same scale: an arm whose own mean is surely below it has nothing to remove.
    """
    if one is None:
        return NOT_MEASURED
    if one.pairs == 1:
        return ONE_PAIR
    before, after = surely_below(one, bound)
    if before and after:
        return "nothing in either arm"
    if shown(one) and not less(one):
        return "increased"
    if before:
        return "nothing to remove"
    if shown(one):
        return "removed" if after else "reduced"
    return "undecided"


def surely_below(one: Comparison, bound: float) -> tuple[bool, bool]:
    """(softmax0, softmax1): whether the upper end of the interval of the arm's own mean is below the bound.

    An arm all of whose values are equal, as where no seed has a sink, has no interval: then the values are.
    """
    if not one.finite:
        return False, False
    own = ((one.baseline_mean, one.baseline_upper), (one.mean, one.upper))
    return tuple((mean if upper is None else upper) < bound for mean, upper in own)


def keeping(one: Comparison | None, diverged: bool) -> str:
    """What is shown of held-out loss: kept, worse, better (perhaps within the margin) or undecided.

    A run that diverged in training has no loss, so that nothing is said of the arm it belongs to.
    """
    if one is None:
        return NOT_MEASURED
    if one.pairs == 1:
        return ONE_PAIR
    if diverged:
        return "undecided"
    if one.test != SIGN_TEST and within_margin(one):
        return "kept"
    if not shown(one):
        return "undecided"
    kind = "better" if less(one) else "worse"
    return kind if one.test == SIGN_TEST or beyond_margin(one) else f"{kind}, perhaps within the margin"


def rescued(one: Comparison, rescues: str) -> str:
    """The verdict of answer.py on the primary metric, as a kind."""
    if one.pairs == 1:
        return ONE_PAIR
    if claimed := direction(one):
        return "less harmful" if claimed < 0 else "more harmful"
    if rescues:
        return "nothing to rescue"
    if one.test != SIGN_TEST and within_margin(one):
        return "differs within the margin" if shown(one) else "equivalent"
    return "undecided"


def explained(whole: Comparison | None, attending: Comparison | None, rest: Comparison | None) -> str:
    """Whether nulled attention explains a kurtosis of the context that is higher under softmax1.

    Args:
        whole, attending: of the logarithms of the context's kurtosis: of all, and of the queries that attend.
        rest: of the difference of the two.
    """
    if whole is None or attending is None or rest is None:
        return NOT_MEASURED
    if whole.pairs == 1:
        return ONE_PAIR
    if not shown(whole):
        return "no rise shown"
    if less(whole):
        return "nothing to explain"
    smaller = shown(rest) and less(rest)
    still = shown(attending) and not less(attending)
    if smaller:
        return "in part" if still else "supported"
    return "not supported" if still else "undecided"


# ------------------------------------------------------------------------------------------------------- sentences


def sinks(them: Pairs) -> Answered:
    """Sink rate of any token, above that at step 0 where it is known.

    First of all attention, as Gu et al. define a sink, then of the attention that goes to tokens at all: the null slot
    takes its share from every token, so that only the second says that tokens are no sinks any more beside each other.
    The second is tested only where the first is shown (a fixed sequence, which needs no further correction).
    """
    known = None not in [values[f"{key}_above_start"] for key in SINKS for values in _all(them)]
    first, second = ((f"{key}_above_start" if known else key) for key in SINKS)
    raw, shares = them.compare(first), them.compare(second)
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
    above = f"above step 0 ({figure(them.at_start(SINKS[0]))} %)" if known else "step 0 is not known"
    told = (
        f"{opening(kinds[SINKS[0]], raw, 'attention sinks')}{also}: heads and texts in which one token gets more than "
        f"{SINK:.0%} of the attention, {above}, {points(raw)}; with every query's weights divided by their sum, "
        f"{points(shares)}; {seen(raw, them)}."
    )
    return Answered(capital(told), kinds, {first: raw, second: shares})


def outliers(them: Pairs) -> Answered:
    """Infinity norm of the residual stream and kurtosis of the FFN output, a verdict each."""
    said, kinds, compared = [], {}, {}
    for key, what, where in (
        (NORM, "outliers by the infinity norm of the residual stream", "largest layer"),
        (KURTOSIS, "outliers by the kurtosis of the FFN output", "full kurtosis, 3 of a Gaussian, mean of layers"),
    ):
        one = them.compare(key)
        kinds[key] = removal(one, math.log(NO_OUTLIERS[key]))
        if one is None:
            said.append(f"{what}: not measured")
            continue
        start = f", {figure(step_0)} at step 0" if (step_0 := them.at_start(key)) is not None else ""
        said.append(f"{opening(kinds[key], one, what)}: {where}, {factor(one)}{start}")
        compared[key] = one
    some = next(iter(compared.values()), None)
    said.append(seen(some, them))
    return Answered(f"{capital('; '.join(said))}.", kinds, compared)


def held_out_loss(them: Pairs) -> Answered:
    one = them.compare(FLOAT32)
    kind = keeping(one, any(run.diverged and run.arm in (BASELINE, PRIMARY_ARM) for run in them.finding.group.runs))
    if one is None:
        return Answered("The held-out loss was not measured.", {FLOAT32: kind})
    perhaps = f", though perhaps by less than the margin of {MARGIN:g} nats" if kind.endswith("margin") else ""
    phrase = {
        "kept": f"{PRIMARY_ARM} keeps held-out loss",
        "worse": f"{PRIMARY_ARM} makes held-out loss worse{perhaps}",
        "better": f"{PRIMARY_ARM} makes held-out loss better{perhaps}",
        "undecided": f"whether {PRIMARY_ARM} keeps held-out loss cannot be said",
        ONE_PAIR: only(one),
    }[kind.partition(",")[0]]
    tost = ""
    if one.low90 is not None:
        inside = "inside" if within_margin(one) else "not inside"
        level = percent(1 - 2 * (1 - one.confidence))
        tost = f"; for equivalence: {level} interval from {figure(one.low90)} to {figure(one.high90)}, {inside} the "
        tost += f"margin of ±{MARGIN:g}"
    before, after = losses(one.baseline_mean, one.baseline_std), losses(one.mean, one.std)
    said = (
        f"{capital(phrase)}{few_pairs(one)}: {PRIMARY_ARM} {after} nats in float32, {BASELINE} {before}, difference "
        f"{figure(one.difference)}{brackets(one, tost)}; {seen(one, them)}."
    )
    return Answered(said + divergences(PRIMARY_ARM, them.finding.group), {FLOAT32: kind}, {FLOAT32: one})


def int8(them: Pairs) -> Answered:
    """The primary question, in a sentence; `answer` has the whole of it."""
    group, metric = them.finding.group, them.finding.compared[PRIMARY_ARM]
    one = metric.get(PRIMARY)
    if failed := failed_check(group):
        return Answered(failed, {PRIMARY: "failed check"})
    if one is None:
        return Answered("Static W8A8 quantization was not measured in a pair.", {PRIMARY: NOT_MEASURED})
    rescues = rescue(one, PRIMARY_ARM, group) if one.pairs > 1 else ""
    kind = rescued(one, rescues)
    if kind == ONE_PAIR:
        phrase = only(one)
    else:
        concluded = verdict(one, PRIMARY_ARM)
        if concluded == "undecided":
            asked = "the arms differ" if rescues else f"{PRIMARY_ARM} rescues INT8"
            concluded = f"whether {asked} cannot be said"
        phrase = f"{rescues}{concluded}{retraction(one, metric.get(QUANTIZED), PRIMARY_ARM)}"
    told = "; ".join(failures(one, PRIMARY_ARM)) or (
        f"{costs(one, PRIMARY_ARM)}, a difference of {figure(one.difference)} nats"
    )
    said = f"{capital(phrase)}{few_pairs(one)}: {told}{brackets(one)}; {seen(one, them)}."
    return Answered(said + undecided_check(group), {PRIMARY: kind}, {PRIMARY: one})


def explanation(them: Pairs) -> Answered:
    """Is a higher kurtosis of the context that of zeros, where attention goes nowhere?"""
    whole, attending = (them.compare(key, EXPLAINING) for key in (CONTEXT, ATTENDS))
    both = [
        {seed: _log_ratio(values[ATTENDS], values[CONTEXT]) for seed, values in arm.items()}
        for arm in (them.before, them.after)
    ]
    rest = compare(*both, tests=EXPLAINING)
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
        f"{capital(phrase)}{few_pairs(whole)}: full kurtosis, mean of layers, {factor(whole)}; of the (query, head) "
        f"pairs alone that attend, {factor(attending)}; the second ratio over the first: {times(rest)}{facts(them)}; "
        f"{seen(whole, them)}."
    )
    compared = {CONTEXT: whole, ATTENDS: attending, f"{ATTENDS}_over_{CONTEXT}": rest}
    return Answered(said, {CONTEXT: kind}, compared)


def _log_ratio(one: float | None, other: float | None) -> float | None:
    """Of full kurtosis, from excess kurtosis; None where one of the two was not measured."""
    if _known(one) is None or _known(other) is None or min(one, other) <= -3:
        return None
    return math.log(one + 3) - math.log(other + 3)


def facts(them: Pairs) -> str:
    """What else the explanation rests on, both arms, without a test."""
    said = ""
    for key, what in (
        ("attending_share", "pairs that attend"),
        ("context_near_zero", f"entries near zero (at most {NEAR_ZERO:.0%} of the root mean square)"),
    ):
        if (one := them.compare(key)) is not None:
            said += f"; {what}, {PRIMARY_ARM} {figure(one.mean)} %, {BASELINE} {figure(one.baseline_mean)} %"
    if (one := them.compare("context_inf_norm")) is not None:
        said += f"; infinity norm, largest layer, {factor(one, sure=False)}"
    return said


# ----------------------------------------------------------------------------------------------- parts of a sentence


def opening(kind: str, one: Comparison, what: str) -> str:
    if kind == ONE_PAIR:
        return f"{only(one)} about {what}"
    said = REMOVAL[kind].format(arm=PRIMARY_ARM, baseline=BASELINE, what=what)
    return f"{said}{few_pairs(one)}"


def only(one: Comparison) -> str:
    return f"open, from one pair (seed {one.seeds[0]}) nothing is concluded"


def brackets(one: Comparison, more: str = "") -> str:
    """The interval of a difference, in brackets; none of one pair."""
    return "" if one.pairs == 1 else f" ({interval(one)}{more})"


def points(one: Comparison) -> str:
    """A rate in both arms, in percent, and the difference in percentage points."""
    return (
        f"{PRIMARY_ARM} {spread(one.mean, one.std)} %, {BASELINE} {spread(one.baseline_mean, one.baseline_std)} %, "
        f"difference {figure(one.difference)} points{brackets(one)}"
    )


def factor(one: Comparison, sure: bool = True) -> str:
    """Geometric means of both arms, and the ratio, of a comparison of logarithms; `sure`: with its interval."""
    if not one.finite:
        return no_interval(one)
    after, before = (figure(math.exp(mean)) for mean in (one.mean, one.baseline_mean))
    return (
        f"{PRIMARY_ARM} {after}, {BASELINE} {before}, ratio {times(one) if sure else figure(math.exp(one.difference))}"
    )


def times(one: Comparison) -> str:
    """A ratio and its interval, of a comparison of logarithms."""
    if not one.finite:
        return no_interval(one)
    ratio = figure(math.exp(one.difference))
    if one.pairs == 1:
        return ratio
    if one.low is None:
        return f"{ratio} ({no_interval(one)})"
    ends = " to ".join(figure(math.exp(end)) for end in (one.low, one.high))
    return f"{ratio} ({percent(one.confidence)} interval from {ends})"


def losses(mean: float | None, std: float | None) -> str:
    """Losses with the decimals that the margin needs."""
    return number(mean, 4) + ("" if std is None else f" ± {number(std, 4)}")


def seen(one: Comparison | None, them: Pairs) -> str:
    """At which scale: pairs, steps, parameters, tokens."""
    pairs = size(one.pairs if one else len(them.before), PRIMARY_ARM, them.finding.group)
    run = next(iter(trained_pairs(them.finding.group, PRIMARY_ARM).values()))[0]
    scale = [f"{shorter(value)} {what}" for what, value in scales(run).items() if value]
    return f"over {pairs}" + (f" ({', '.join(scale)})" if scale else "")


def scales(run: Run) -> dict[str, int | None]:
    """Parameters and real tokens seen, as training wrote them down; None where it did not."""
    keys = {"parameters": "model.parameters", "tokens a run": "training.tokens"}
    return {what: look_up(run.results, key, None) for what, key in keys.items()}


def shorter(count: int) -> str:
    """5.3M, 84M, 420k."""
    for size_of, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size_of:
            return f"{count / size_of:.{1 if count < 10 * size_of else 0}f}{letter}"
    return str(count)


def _all(them: Pairs) -> list[dict[str, float | None]]:
    return [*them.before.values(), *them.after.values()]
