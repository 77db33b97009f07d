"""One sentence for each question: every row of DEFINITIONS.md's tables, with made-up results."""

import inspect
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from made_runs import diverged, made, pairs

import questions as module
from answer import findings
from questions import REMOVAL, explained, keeping, questions, rescued
from report import dose_section, report

SEEDS = (42, 43, 44)


def with_values(before: dict, after: dict, start: float | None = 0.0, **changes):
    """Pairs in which softmax0 and softmax1 have these values, a list over the seeds for each metric."""
    runs = []
    for i, seed in enumerate(SEEDS[: len(next(iter(before.values())))]):
        for n, values in ((0, before), (1, after)):
            values_of_seed = {key: of_seeds[i] for key, of_seeds in values.items()}
            run = made(n, seed, values_of_seed.get("gap", 0.5 + 0.1 * n), values_of_seed.get("loss", 3.0), **changes)
            raw = values_of_seed.get("sinks", 0.0) / 100
            rates = {
                "sink_rate_any": raw,
                "sink_rate_any_renormalised": values_of_seed.get("renormalised", 100 * raw) / 100,
            }
            layer = run.attention["layer.0"] | {key: [rate, rate] for key, rate in rates.items()}
            layer["context_kurtosis_attending"] = values_of_seed.get("attending", 1.0)
            run.attention = dict.fromkeys(run.attention, layer)
            run.places = {name: dict(values) for name, values in run.places.items()}
            for name, values in run.places.items():
                if name.endswith("ffn_residual"):
                    values["inf_norm"] = values_of_seed.get("norm", 5.0)
                if name.endswith("ffn_output"):
                    values["kurtosis_sequence"] = values_of_seed.get("kurtosis", 1.0)
                if name.endswith(".context"):
                    values["kurtosis_sequence"] = values_of_seed.get("context", 1.0)
            if start is not None:
                before_training = layer | {key: [start / 100] * 2 for key in rates}
                run.untrained = {"places": run.places, "attention": {"layer.0": before_training}}
            runs.append(run)
    return runs


def ask(runs, question):
    return questions(findings(runs))[question]


MANY, FEW, NONE = [20.0, 23.0, 25.0], [5.0, 7.0, 9.0], [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("before", "after", "kind", "begins"),
    [
        (MANY, [0.1, 0.2, 0.0], "removed", "Softmax1 removes attention sinks, also among the attention that"),
        (MANY, NONE, "removed", "Softmax1 removes attention sinks"),  # no spread: the value counts
        (MANY, FEW, "reduced", "Softmax1 reduces attention sinks"),
        (FEW, MANY, "increased", "Softmax1 increases attention sinks"),
        (NONE, MANY, "increased", "Softmax1 increases attention sinks"),
        ([0.0, 0.1, 0.2], [0.0, 0.0, 40.0], "nothing to remove", "Softmax0 has no attention sinks that could be"),
        (NONE, [0.1, 0.2, 0.0], "nothing in either arm", "Neither softmax0 nor softmax1 has attention sinks, so"),
        ([0.0, 0.0, 40.0], [0.0, 0.1, 0.2], "undecided", "Whether softmax1 removes attention sinks cannot be said"),
        ([20.0], [0.0], "one pair", "Open, from one pair (seed 42) nothing is concluded about attention sinks"),
    ],
)  # fmt: skip
def test_sinks(before, after, kind, begins):
    answered = ask(with_values({"sinks": before}, {"sinks": after}), "sinks")
    assert answered.kinds["sink_rate_any"] == kind and answered.said.startswith(begins)
    assert (REMOVAL.keys() | {"one pair"}) >= {kind}
    comparison = answered.comparisons["sink_rate_any_above_start"]
    assert comparison.confidence == pytest.approx(1 - 0.05 / 4)
    if comparison.low is not None:
        low, high = scipy.stats.ttest_1samp(np.subtract(after, before), 0).confidence_interval(1 - 0.05 / 4)
        assert (comparison.low, comparison.high) == pytest.approx(
            (low, high)
        ) and "98.8% interval from" in answered.said
    assert f"over {'one pair' if len(before) == 1 else '3 pairs'} of 3,000 steps" in answered.said


def test_the_rate_at_step_0_is_subtracted():
    """A rate of 20 % of which 19.9 % existed before training is not a sign of sinks that training made."""
    runs = with_values({"sinks": [20.0, 20.1, 20.2]}, {"sinks": [19.9, 20.0, 20.1]}, start=19.9)
    answered = ask(runs, "sinks")
    assert (
        answered.kinds["sink_rate_any"] == "nothing in either arm"
        and "minus that share at step 0 (19.9 %)" in answered.said
    )
    runs[0].untrained = {}
    answered = ask(runs, "sinks")
    assert answered.kinds["sink_rate_any"] == "undecided" and "step 0 is not known" in answered.said
    assert answered.comparisons.keys() == {"sink_rate_any", "sink_rate_any_renormalised"}


@pytest.mark.parametrize(
    ("renormalised", "kind", "said"),
    [
        ([0.1, 0.2, 0.3], "removed", "sinks, also among the attention that tokens get at all: "),
        ([9.0, 11.0, 15.0], "reduced", "sinks, also among the attention that tokens get at all: "),
        ([10.0, 40.0, 20.0], "undecided", "sinks, but that is not shown among the attention that tokens get at all: "),
        ([60.0, 61.0, 66.0], "increased", "sinks, but increases them among the attention that tokens get at all: "),
    ],
)
def test_fewer_sinks_by_the_null_slot_alone(renormalised, kind, said):
    before = {"sinks": MANY}
    answered = ask(with_values(before, {"sinks": FEW, "renormalised": renormalised}), "sinks")
    assert answered.kinds == {"sink_rate_any": "reduced", "sink_rate_any_renormalised": kind} and said in answered.said
    # It is tested only where the first is shown.
    answered = ask(with_values(before, {"sinks": [0.0, 40.0, 20.0], "renormalised": renormalised}), "sinks")
    assert answered.kinds == {"sink_rate_any": "undecided"} and "among the attention" not in answered.said


LARGE, SMALLER, SMALL = [30.0, 90.0, 300.0], [9.0, 28.0, 88.0], [4.0, 4.1, 4.2]


@pytest.mark.parametrize(("key", "shift"), [("norm", 0), ("kurtosis", 3)])
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (LARGE, SMALL, "undecided"),  # a ratio from 0.13 to 0.014: three pairs of such a spread show nothing
        ([30.0, 31.0, 33.0], SMALL, "removed"),
        (LARGE, SMALLER, "reduced"),  # a constant factor, which the difference of means does not show
        (SMALLER, LARGE, "increased"),
        (SMALL, [4.1, 4.0, 40.0], "nothing to remove"),
        (SMALL, [4.3, 4.5, 4.7], "nothing in either arm"),  # a rise that is shown, and no outliers
        ([30.0], [4.0], "one pair"),
    ],
)
def test_outliers(key, shift, before, after, kind):
    """Both are compared by ratios. Full kurtosis is excess kurtosis plus 3; the bound is 6 for both metrics."""
    metric = {"norm": "residual_inf_norm", "kurtosis": "ffn_output_kurtosis"}[key]
    runs = with_values({key: np.subtract(before, shift)}, {key: np.subtract(after, shift)})
    answered = ask(runs, "outliers")
    assert answered.kinds[metric] == kind
    other = "ffn_output_kurtosis" if key == "norm" else "residual_inf_norm"
    assert answered.kinds[other] == ("one pair" if len(before) == 1 else "nothing in either arm")
    assert answered.said.lower().count("outliers (") == 2  # a verdict each
    ratios = np.log(after) - np.log(before)
    assert answered.comparisons[metric].difference == pytest.approx(ratios.mean())
    if len(before) > 1:
        interval = scipy.stats.ttest_1samp(ratios, 0).confidence_interval(1 - 0.05 / 4)
        comparison = answered.comparisons[metric]
        assert (comparison.low, comparison.high) == pytest.approx(tuple(interval))
        ratio, low, high = (
            module.figure(math.exp(log)) for log in (comparison.difference, comparison.low, comparison.high)
        )
        assert f"ratio {ratio} (98.8% interval from {low} to {high})" in answered.said
        table = findings(runs)[0].compared["softmax1"][metric]
        assert table.ratio == pytest.approx(math.exp(ratios.mean())) and table.ratio_low > math.exp(comparison.low)


def test_a_norm_that_is_not_finite():
    answered = ask(with_values({"norm": [math.inf, 30.0, 31.0]}, {"norm": SMALL}), "outliers")
    assert (
        answered.kinds["residual_inf_norm"] == "undecided" and "not finite in 1 of 3 pairs; sign test" in answered.said
    )


BASE = [3.00, 3.10, 3.05]


@pytest.mark.parametrize(
    ("differences", "kind", "begins"),
    [
        ([0.0010, -0.0005, 0.0002], "kept", "Softmax1 keeps held-out loss: softmax1 "),
        ([0.0030, 0.0031, 0.0032], "kept", "Softmax1 keeps held-out loss: softmax1 "),  # shown, and inside the margin
        ([0.10, 0.11, 0.12], "worse", "Softmax1 makes held-out loss worse: "),
        ([-0.10, -0.11, -0.12], "better", "Softmax1 makes held-out loss better: "),
        (
            [0.010, 0.012, 0.014],
            "worse, perhaps within the margin",
            "Softmax1 makes held-out loss worse, though perhaps by less than the margin of 0.01 nats: ",
        ),
        (
            [-0.010, -0.012, -0.014],
            "better, perhaps within the margin",
            "Softmax1 makes held-out loss better, though perhaps by less than the margin of 0.01 nats: ",
        ),
        ([0.03, -0.02, 0.01], "undecided", "Whether softmax1 keeps held-out loss cannot be said: "),
        ([0.03], "one pair", "Open, from one pair (seed 42) nothing is concluded: "),
    ],
)
def test_held_out_loss(differences, kind, begins):
    before = BASE[: len(differences)]
    runs = with_values({"loss": before}, {"loss": np.add(before, differences)})
    answered = ask(runs, "held_out_loss")
    assert answered.kinds == {"held_out_loss": kind} and answered.said.startswith(begins)
    if len(differences) > 1:
        comparison = answered.comparisons["held_out_loss"]
        test = scipy.stats.ttest_1samp(differences, 0)
        assert (comparison.low, comparison.high) == pytest.approx(tuple(test.confidence_interval(1 - 0.05 / 4)))
        assert (comparison.low90, comparison.high90) == pytest.approx(tuple(test.confidence_interval(1 - 0.1 / 4)))
        assert ("not inside the margin" in answered.said) == (kind != "kept")


@pytest.mark.parametrize("n", [0, 1])
def test_a_divergence_leaves_held_out_loss_undecided(n):
    runs = with_values({"loss": BASE}, {"loss": np.add(BASE, [0.0010, -0.0005, 0.0002])})
    answered = ask([*runs, diverged(n, 60), made(1 - n, 60)], "held_out_loss")
    assert answered.kinds == {"held_out_loss": "undecided"} and f"seed 60: softmax{n} diverged at step" in answered.said
    assert "over 3 pairs of 3,000 steps in which both arms were trained" in answered.said


@pytest.mark.parametrize(
    ("before", "after", "kind", "begins"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.2, 1.1], "less harmful", "Softmax1 makes quantization less harmful here: static"),
        ([1.0, 1.2, 1.1], [2.0, 2.1, 2.2], "more harmful", "Softmax1 makes quantization more harmful here"),
        ([0.5, 0.601, 0.7], [0.501, 0.6, 0.7], "equivalent", "Softmax1 and softmax0 are equivalent in what"),
        ([0.5, 0.601, 0.7], [0.495, 0.5961, 0.6951], "differs within the margin", "Softmax1 differs, by less than"),
        ([0.002, 0.0021, 0.001], [0.001, 0.0015, 0.002], "nothing to rescue", "There is nothing to rescue, quantiz"),
        ([0.002, 0.0021, 0.001], [0.0, 0.5, 0.9], "nothing to rescue", "There is nothing to rescue in softmax0 (upper"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.5], "undecided", "Whether softmax1 rescues INT8 cannot be said: static W8A8"),
        ([2.0], [1.0], "one pair", "Open, from one pair (seed 42) nothing is concluded: static W8A8"),
        ([math.nan] * 3, [1.0] * 3, "undecided", "Whether softmax1 rescues INT8 cannot be said: softmax0's loss after"),
    ],
)  # fmt: skip
def test_int8(before, after, kind, begins):
    answered = ask(pairs(before, after), "int8")
    assert answered.kinds == {"w8a8_static_gap": kind} and answered.said.startswith(begins)
    if len(before) > 1 and np.isfinite(before).all():
        assert "(95% interval from" in answered.said  # the primary question shares its error with none
    if begins.startswith("There is nothing to rescue in softmax0"):
        assert "; whether the arms differ cannot be said: " in answered.said


def test_int8_is_qualified_and_withdrawn_like_the_whole_answer():
    answered = ask(pairs([2.0, 2.1, 2.2], [1.0, 1.2, 1.1], after_loss=5.0), "int8")
    assert answered.said.startswith("Softmax1 makes quantization less harmful here, but the quantized model is worse: ")
    runs = pairs([2.0, 2.1, 2.2], [1.0, 1.2, 1.1])
    runs[0].damage["self_check"] = {"passed": None}
    assert ask(runs, "int8").said.endswith("they have learnt too little that quantization could destroy.")
    runs[1].damage["self_check"] = {"passed": False}
    asked = questions(findings(runs))
    assert asked["int8"].kinds == {"w8a8_static_gap": "failed check"}
    assert asked["int8"].said.startswith("None: the instrument failed its own check on esperberto-softmax1-seed42")
    assert asked["held_out_loss"].kinds == {"held_out_loss": "undecided"}  # which needs no quantization
    assert rescued(findings(pairs([2.0], [1.0]))[0].compared["softmax1"]["w8a8_static_gap"], "") == "one pair"
    assert ask([made(0, 42, None), made(1, 42, None)], "int8").kinds == {"w8a8_static_gap": "not measured"}


PLAIN = [3.0, 3.4, 3.8]


@pytest.mark.parametrize(
    ("context", "attending", "kind", "begins"),
    [
        ([110, 120, 130], [3.1, 3.3, 3.9], "supported", "Queries whose attention goes nowhere explain the higher"),
        ([110, 120, 130], [9.0, 10.0, 11.0], "in part", "Queries whose attention goes nowhere explain the higher"),
        ([110, 120, 130], [111, 119, 130], "not supported", "That queries whose attention goes nowhere explain the"),
        ([110, 120, 130], [0.0, 120, 900], "undecided", "Whether queries whose attention goes nowhere explain"),
        ([0.0, 0.4, 0.8], [0.0, 0.4, 0.8], "nothing to explain", "The kurtosis of the attention context is lower with"),
        ([3.1, 3.3, 3.9], [3.1, 3.3, 3.9], "no rise shown", "That softmax1 raises the kurtosis of the attention"),
        ([110], [3.3], "one pair", "Open, from one pair (seed 42) nothing is concluded: full kurtosis"),
    ],
)  # fmt: skip
def test_explanation(context, attending, kind, begins):
    before = {key: PLAIN[: len(context)] for key in ("context", "attending")}
    answered = ask(with_values(before, {"context": context, "attending": attending}), "explanation")
    assert answered.kinds == {"context_kurtosis": kind} and answered.said.startswith(begins)
    whole, alone = np.add(context, 3), np.add(attending, 3)
    rest = answered.comparisons["context_kurtosis_attending_over_context_kurtosis"]
    assert rest.difference == pytest.approx(np.log(alone / whole).mean())  # 0 in softmax0
    assert rest.confidence == pytest.approx(1 - 0.05 / 3)
    assert "entries near zero (at most 1% of the root mean square), softmax1 10.0 %, softmax0 10.0 %" in answered.said


def test_without_attending_queries_nothing_is_explained():
    runs = with_values({"context": PLAIN}, {"context": PLAIN, "attending": [math.nan] * 3})
    assert ask(runs, "explanation").kinds == {"context_kurtosis": "not measured"}
    assert explained(None, None, None) == keeping(None, False) == "not measured"


def test_every_sentence_states_the_scale():
    runs = with_values({"sinks": MANY}, {"sinks": FEW}, model__parameters=5_310_000, training__tokens=21_345_678)
    for answered in questions(findings(runs)).values():
        assert "over 3 pairs of 3,000 steps (5.3M parameters, 21M tokens a run)" in answered.said
    assert [module.shorter(count) for count in (7, 4_200, 420_000, 83_529_024, 2.1e9)] == [
        *("7", "4.2k", "420k", "84M", "2.1G")
    ]


def test_two_pairs_are_named_with_their_t_at_the_corrected_level():
    runs = with_values({"sinks": MANY[:2]}, {"sinks": FEW[:2]})
    assert "cannot be said, from two pairs only (t = 50.9)" in ask(runs, "sinks").said


def test_there_are_no_answers_without_pairs_of_softmax1():
    assert questions([]) == {} == questions(findings([made(0, 42), made(0.5, 42)]))
    assert questions(findings(pairs([1.0], [2.0], test_pipeline=True))) == {}
    assert questions(findings([made(0, 42), diverged(1, 42)])) == {}


def test_other_arms_change_no_sentence():
    runs = with_values({"sinks": MANY}, {"sinks": FEW})
    more = [made(n, seed, 0.3) for n in (0.25, 4) for seed in SEEDS]
    assert questions(findings(runs + more)) == questions(findings(runs))


def test_the_answers_are_plain_json():
    text = json.dumps(
        {key: asdict(answered) for key, answered in questions(findings(pairs([2.0, 2.1], [1.0, 1.2]))).items()}
    )
    assert json.loads(text).keys() == module.LABELS.keys()


# ----------------------------------------------------------------------------------------------------- in the report


def whole(runs):
    return report(
        runs, [], findings(runs), 4, "data", {"emergence_seeds.png": ("one", "One."), "loss.png": ("two", "Two.")}, True
    )


def test_the_report_leads_with_the_sentences():
    runs = with_values({"sinks": MANY}, {"sinks": FEW})
    text = whole(runs)
    places = [text.index(f"- **{label}.** ") for label in module.LABELS.values()]
    order = ["| **W8A8 static", "](emergence_seeds.png)", "## INT8, the primary question", "## Summary", "](loss.png)"]
    places += [text.index(part) for part in order]
    assert places == sorted(places)
    assert "share an error of 5% (Bonferroni, 98.8% each)" in text
    assert (
        "All these runs: batches of 16, at most 512 tokens a text, learning rate 5e-05, weight decay 0, "
        "adamw_torch_fused, float32." in text
    )
    assert "**Answer.** None: there is no pair here" in whole([made(0, 42)])


def test_all_arms_side_by_side():
    halves = [made(0.5, seed, gap, size=2.0) for seed, gap in zip(SEEDS, (1.0, 1.4, 1.2), strict=True)]
    gated = [made(0, seed, 0.4, settings__control="gated") for seed in SEEDS[:2]]
    learned = [made("learned", seed, 0.6) for seed in SEEDS[:2]]
    runs = [*gated, *learned, *pairs([2.0, 2.2, 2.4], [1.0, 1.4, 1.2]), *halves, diverged(4, 42), made(4, 43)]
    assert dose_section(findings(pairs([2.0, 2.1], [1.0, 1.2]))) == [] == dose_section([])
    _, table, _ = dose_section(findings(runs))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    arms = ["softmax0.5", "softmax1", "softmax4", "softmax_learned", "gated"]
    assert rows[0] == ["", "softmax0", "softmax0, seeds 42, 43", *arms]
    cells = {first: rest for first, *rest in rows}
    assert cells["seeds"] == [
        *("42 to 44", "42, 43", "42 to 44", "42 to 44", "42, 43 (1 diverged)", "42, 43", "42, 43")
    ]
    assert cells["W8A8 static: held-out loss over float32, nats"] == [
        *("2.20 ± 0.20", "2.10 ± 0.14", "1.20 ± 0.20", "1.20 ± 0.20", "0.50", "0.60 ± 0.00", "0.40 ± 0.00")
    ]
    assert cells["residual stream: infinity norm, largest layer"][2] == "2.00 ± 0.00"
    # At the top, the arm named beforehand alone.
    first = whole(runs).partition("](emergence_seeds.png)")[0]
    assert first.count("| **W8A8 static") == 1 and "softmax0.5 |" not in first


def test_every_rule_is_written_down():
    """The tables in DEFINITIONS.md contain every kind of conclusion and its words."""
    text = (Path(module.__file__).parent / "DEFINITIONS.md").read_text(encoding="utf-8")
    rules = text.partition("## One sentence for each question")[2].partition("\n## ")[0]
    decisions = [module.removal, module.rescued, module.explained]
    source = "".join(map(inspect.getsource, decisions))
    kinds = {*re.findall(r'(?:return|else) "([a-z ]+)"', source), "one pair", "not measured"}
    kinds |= {*module.LOSS_KINDS.values(), "equivalent", "differs within the margin"}
    assert len(kinds) > 15
    for kind in [*kinds, *REMOVAL, "failed check", "worse, perhaps within the margin"]:
        assert f"`{kind}`" in rules, kind
    for phrase in (
        "so there is nothing to remove", "softmax1 increases", "softmax1 removes", "softmax1 reduces", "cannot be said",
        "that could be removed", "also among the attention that tokens get at all", "softmax1 keeps held-out loss",
        "but increases them among the attention that tokens get at all", "nothing is concluded",
        "but that is not shown among the attention that tokens get at all", "whether the arms differ",
    ):  # fmt: skip
        assert phrase in rules, phrase
    for bound in ("below 1 % of heads and texts", "below 6, where", "below 6 (excess 3", "98.75 % each", "98.3 %"):
        assert bound in rules
