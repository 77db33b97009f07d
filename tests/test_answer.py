"""Every row of the table "What is concluded" in DEFINITIONS.md, with made-up results."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import diverged, made, pairs

import answer as module
import quantization
from answer import METRICS, PRIMARY, answer, findings
from report import comparison_table
from sets import headline
from tables import figure


def said(runs):
    return answer(runs, findings(runs))


LESS = ([2.0, 2.1, 2.2], [1.0, 1.2, 1.1])
NAN = math.nan


@pytest.mark.parametrize(
    ("before", "after", "begins"),
    [
        (*LESS, "Softmax1 makes quantization less harmful here: over 3 pairs"),
        (*LESS[::-1], "Softmax1 makes quantization more harmful here: over 3 pairs"),
        # The difference is shown; the margin lies inside its interval.
        (
            [0.500, 0.601, 0.700],
            [0.4899, 0.5925, 0.6901],
            "Softmax1 makes quantization less harmful here, though perhaps by less than the margin of 0.01 nats",
        ),
        # The difference is shown, and its interval is inside the margin.
        ([0.500, 0.601, 0.700], [0.495, 0.5961, 0.6951], "Softmax1 differs, by less than the margin of 0.01 nats"),
        (
            [0.500, 0.601, 0.700],
            [0.501, 0.600, 0.700],
            "Softmax1 and softmax0 are equivalent (TOST, margin ±0.01 nats)",
        ),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.5], "Undecided: over 3 pairs"),
        # The means are near 0, the intervals are not.
        ([0.5, -0.25, -0.25], [-0.2, 0.3, -0.1], "Undecided: over 3 pairs"),
        (
            [0.0020, 0.0021, 0.0010],
            [-0.0010, -0.0009, -0.0021],
            "There is nothing to rescue, quantization harms neither softmax0 nor softmax1 (of each, upper end of the "
            "95% interval of its mean gap under 0.01 nats); softmax1 differs, by less than the margin",
        ),
        (
            [0.0020, 0.0021, 0.0010],
            [1.0, 1.1, 1.2],
            "There is nothing to rescue in softmax0 (upper end of the 95% interval of its mean gap under 0.01 nats); "
            "softmax1 makes quantization more harmful here",
        ),
        ([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], "Undecided: over 3 pairs"),  # no spread
    ],
)
def test_several_pairs(before, after, begins):
    runs = pairs(before, after)
    text = said(runs)
    assert text.startswith(begins)
    one = findings(runs)[0].compared["softmax1"][PRIMARY]
    assert one.difference == pytest.approx(np.mean(after) - np.mean(before))
    if one.low is None:
        assert "no spread over 3 pairs" in text and "p =" not in text
    else:
        assert f"95% interval from {figure(one.low)} to {figure(one.high)}" in text and "p = " in text
    # What is undecided says what could have been shown; nothing else does.
    effect = f"show a difference of {figure(one.detectable)} nats or more with 80% power"
    assert (effect in text) == (begins.startswith("Undecided") and one.detectable is not None)


def test_a_point_is_no_equivalence():
    """Difference -.0095 with an interval from -.0170 to -.0020: shown, and perhaps beyond the margin."""
    differences = np.array([-0.0095 - 0.00302, -0.0095, -0.0095 + 0.00302])
    text = said(pairs([0.5, 0.6, 0.7], list(np.array([0.5, 0.6, 0.7]) + differences)))
    assert "from -0.0170 to -0.0020" in text and text.startswith(
        "Softmax1 makes quantization less harmful here, though"
    )
    assert "equivalent" not in text and "nothing to rescue" not in text


@pytest.mark.parametrize(
    ("before", "after"),
    [([0.001], [0.002]), ([0.001, 0.9], [0.002, -0.9]), ([NAN, NAN], [0.0, 0.001]), ([NAN], [NAN])],
)
def test_nothing_to_rescue_needs_an_interval(before, after):
    assert "nothing to rescue" not in said(pairs(before, after))


def test_a_smaller_gap_of_a_model_that_is_no_better():
    assert ", but" not in said(pairs(*LESS))
    runs = pairs(*LESS, after_loss=5.0)  # 2 nats worse in float32, 1 nat better in the gap
    text = said(runs)
    assert text.startswith("Softmax1 makes quantization less harmful here, but the quantized model is worse: over 3")
    assert (
        "loss after quantization: softmax1 6.10 ± 0.100 nats, softmax0 5.10 ± 0.100, difference 1.00 (95%" not in text
    )
    assert "loss after quantization: softmax1 6.10 ± 0.10 nats, softmax0 5.10 ± 0.10, difference 1.00 (95% in" in text
    assert "loss in float32: softmax1 5.00 ± 0.00 nats, softmax0 3.00 ± 0.00, difference 2.00 (no spread over 3" in text
    for run, more in zip([run for run in runs if run.arm == "softmax1"], (0, 2.1, -2.2), strict=True):
        schemes = run.damage["schemes"]
        schemes["w8a8_static"]["loss"] = schemes["w8a8_static"]["gap"] + 4 + more
    assert "less harmful here, but the quantized model is no better (its loss is not shown to be lower): over" in said(
        runs
    )
    assert ", but" not in said(pairs(*LESS[::-1]))  # a larger gap has nothing to be taken back


def test_two_pairs_say_so():
    text = said(pairs([2.0, 2.1], [1.0, 1.101]))
    assert text.startswith(
        "Softmax1 makes quantization less harmful here, from two pairs only (t = 12.7): over 2 pairs"
    )
    assert said(pairs([2.0, 2.1], [1.0, 2.5])).startswith("Undecided, from two pairs only (t = 12.7): over 2 pairs")


# ----------------------------------------------------------------------------------------------------------- one pair


def test_one_pair_is_a_fact_and_no_test():
    text = said(pairs([2.0], [1.0]))
    assert text.startswith(
        "Open: one pair (seed 42), no test. In it static W8A8 quantization costs softmax1 1.00 nats of held-out loss, "
        "softmax0 2.00, a difference of -1.00 nats; loss after quantization: softmax1 4.00 nats, softmax0 5.00, "
    )
    assert text.endswith("Nothing can be concluded about softmax1 beyond this pair.") and "interval" not in text


def test_one_pair_that_is_no_number():
    text = said(pairs([NAN], [1.0]))
    assert text.startswith(
        "Open: one pair (seed 42), no test. softmax0's loss after quantization is not a number in the"
    )
    text = said([made(0, 42), diverged(1, 42)])
    assert text.startswith("Open: one pair (seed 42), no test. seed 42: softmax1 diverged at step 1,200")


# ------------------------------------------------------------------------------------------- what is no number, or fell


def test_losses_that_are_no_number_are_ranked():
    text = said(pairs([NAN, math.inf, 1.0], [1.0, 1.0, 2.0]))
    assert text.startswith(
        "Undecided: softmax0's loss after quantization is not a number in 2 of 3 pairs (seed 42, 43). A loss that is "
        "not a number is worse than any that is one: static W8A8 quantization costs softmax1 less than softmax0 in 2 "
        "of 3 pairs and more in 1 (exact two-sided sign test over seeds, p = 1; 3 "
        "pairs cannot give less than p = 0.25)."
    )
    text = said(pairs([NAN] * 6, [1.0] * 6))
    assert text.startswith("Softmax1 makes quantization less harmful here: softmax0's loss") and "p = 0.031" in text
    text = said(pairs([1.0] * 6, [NAN] * 6))
    assert text.startswith("Softmax1 makes quantization more harmful here: softmax1's loss") and "p = 0.031" in text
    text = said(pairs([NAN, NAN, 1.0], [NAN, 1.0, 0.5]))
    assert "in 2 of 3 pairs and more in 0, 1 tied and left out" in text


def test_diverged_runs_count_and_are_named():
    runs = [*pairs([1.0] * 5, [0.5] * 5), diverged(0, 60), made(1, 60)]
    text = said(runs)
    assert text.startswith("Softmax1 makes quantization less harmful here: seed 60: softmax0 diverged at step 1,200. ")
    assert "in 6 of 6 pairs and more in 0 (exact two-sided sign test over seeds, p = 0.031" in text
    lost = said([*pairs([1.0] * 5, [0.5] * 5), made(0, 60), diverged(1, 60)])
    assert "in 5 of 6 pairs and more in 1" in lost and "softmax1 diverged at step 1,200" in lost
    both = said([*pairs([0.001, 0.002], [0.002, 0.003]), diverged(0, 60), diverged(1, 60, step=7)])
    assert both.startswith(
        "Undecided: seed 60: softmax0 diverged at step 1,200; seed 60: softmax1 diverged at step 7. "
    )
    assert "1 tied and left out" in both and "nothing to rescue" not in both
    # Without a partner it is in no pair, and named all the same.
    assert "seed 61: softmax0 diverged at step 1,200" in said([*pairs(*LESS), diverged(0, 61)])


def test_two_diverged_models():
    text = said([diverged(0, 42), diverged(1, 42)])
    assert text.startswith(
        "Open: one pair (seed 42), no test. seed 42: softmax0 diverged at step 1,200. seed 42: softmax1"
    )
    text = said([diverged(n, seed) for n in (0, 1) for seed in (42, 43)])
    assert text.startswith("Undecided: ") and "p = 1)" in text and "nothing to rescue" not in text


# ------------------------------------------------------------------------------------------------- which runs and arms


def test_no_pair():
    assert said([made(0, 42)]).startswith("None: there is no pair here")
    assert said([made(0, 42), made(1, 43)]).startswith("None: there is no pair here")
    assert said([]).startswith("None: there is no pair here")
    assert "was not measured" in said([made(0, 42, None), made(1, 42, None)])


def test_the_pipeline_test_answers_nothing_and_spoils_nothing():
    smoke = pairs([1.0], [2.0], test_pipeline=True)
    assert said(smoke).startswith("None: --test_pipeline made these runs")
    real = pairs(*LESS)
    assert said(real + smoke) == said(smoke[:1] + real) == said(real)


def test_the_pair_that_is_trained_longest_answers_first():
    full = pairs([2.0], [1.0], training__steps=285_899)
    short = [made(0, 1, training__steps=600), made(1, 2, training__steps=600), made(1, 3, training__steps=600)]
    assert said(full + short) == said(full)
    toys = pairs(*LESS, training__steps=600)
    assert said(toys + full) == f"{said(full)} Another set of 6 runs, 600 steps: {said(toys)}"


def test_other_arms_are_exploratory_and_share_the_error():
    halves = [made(0.5, seed, gap) for seed, gap in zip((42, 43, 44), (1.0, 1.2, 1.1), strict=True)]
    twos = [made(2, seed, gap) for seed, gap in zip((42, 43, 44), (1.0, 1.2, 1.1), strict=True)]
    runs = pairs(*LESS)
    first, second = said(runs + halves).split(" Exploratory: ")
    assert first == said(runs) and second.startswith("Softmax0.5 makes quantization less harmful here")
    assert "95% interval" in second and "Bonferroni" not in second
    compared = findings(twos + runs + halves)[0].compared
    assert list(compared) == ["softmax1", "softmax2", "softmax0.5"]
    assert [one[PRIMARY].confidence for one in compared.values()] == pytest.approx([0.95, 0.975, 0.975])
    text = said(runs + halves + twos)
    assert text.count("Exploratory: ") == 2 and text.count("corrected for 2 exploratory arms, Bonferroni") == 2
    assert text.count("97.5% interval from") == 4  # of the gap and of the loss, in either arm
    alone = said([run for run in runs if run.arm == "softmax0"] + halves)
    assert alone.startswith("None about softmax1, the arm named beforehand: it has no pair here. Exploratory: ")


def test_near_arms_have_names_of_their_own():
    runs = [*pairs(*LESS), *(made(1.0000001, seed) for seed in (42, 43, 44))]
    assert list(findings(runs)[0].compared) == ["softmax1", "softmax1.0000001"]


def test_the_class_is_never_looked_at():
    """n = 1e-30 is softmax in the other class: the same figures give no difference, whatever the class is called."""
    text = said(pairs([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], n=1e-30))
    assert "no spread over 3 pairs" in text and "Exploratory: Undecided" in text
    one = said(pairs(*LESS, n=1e-30)).replace("oftmax1e-30", "oftmax0.5")
    assert one == said(pairs(*LESS, n=0.5))


# -------------------------------------------------------------------------------------------------- interval over texts


def test_the_interval_over_texts_stands_beside(monkeypatch):
    """Of several pairs, the texts' losses are averaged first: all runs score the same texts."""

    def bootstrap(before, after, scheme):
        gap = [np.subtract(one["texts"][scheme], one["texts"]["float32"]) for one in (before, after)]
        gap = np.sum(gap[1] - gap[0]) / np.sum(before["masked"])
        return gap - 1, gap + 1

    monkeypatch.setattr(quantization, "bootstrap_difference", bootstrap, raising=False)

    def with_texts(runs):
        for run in runs:
            gap = run.damage["schemes"]["w8a8_static"]["gap"]
            run.damage |= {"masked": [4, 6], "texts": {"float32": [1.0, 2.0], "w8a8_static": [1.0 + 10 * gap, 2.0]}}
        return runs

    runs = with_texts(pairs([2.0], [1.5]))
    assert "(95% interval over texts, this pair only: -1.50 to 0.50)" in said(runs)
    runs = with_texts(pairs(*LESS))
    one = findings(runs)[0].compared["softmax1"]
    assert (one[PRIMARY].texts_low, one[PRIMARY].texts_high) == pytest.approx((-2, 0))
    assert "; 95% interval over texts: -2.00 to 0.00; " in said(runs)
    rows = comparison_table(one, "softmax1", METRICS).splitlines()
    assert rows[0].rstrip("| ").endswith("95% interval over texts")
    assert [row.rstrip("| ")[-13:] for row in rows[2:4]] == ["-2.00 to 0.00", rows[3].rstrip("| ")[-13:]]
    assert all(row.rstrip("| ").endswith("–") for row in rows[3:])
    runs[0].damage["masked"] = [5, 5]  # other texts: they cannot be drawn together
    assert "over texts" not in said(runs)


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_comparison_table_drops_nothing():
    runs = pairs([NAN, 1.0, 2.0], [0.5, 0.5, 0.5])
    (compared,) = (found.compared["softmax1"] for found in findings(runs))
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in
             comparison_table(compared, "softmax1", METRICS).splitlines()]  # fmt: skip
    gap = next(row for row in table if row[0].startswith("**W8A8 static"))
    assert gap[1:] == [
        "not a number in 1 of 3",
        "0.50 ± 0.00",
        "–",
        "not a number in 1 of 3 pairs; sign test, p = 0.25",
        "–",
    ]
    assert next(row for row in table if row[0].startswith("heads that do nothing"))[4] == "no spread over 3 pairs"


def test_every_rule_is_written_down():
    """The table in DEFINITIONS.md names what the code says."""
    text = (Path(module.__file__).parent / "DEFINITIONS.md").read_text(encoding="utf-8")
    rules = text.partition("## What is concluded")[2].partition("\n## ")[0]
    for phrase in (
        "less harmful here", "though perhaps by less than the margin", "differs, by less than the margin",
        "are equivalent (TOST", "Undecided", "There is nothing to rescue in softmax0", "quantization harms neither",
        "but the quantized model is worse", "but the quantized model is no better", "from two pairs only",
        "Open: one pair", "is not a number in", "diverged at step", "Exploratory:", "None: there is no pair here",
        "None: --test_pipeline made these runs", "Another set of", "no spread over", "with 80% power",
        "None about softmax1",
    ):  # fmt: skip
        assert phrase in rules, phrase
    assert f"{module.MARGIN:g} nats" in rules
    assert re.search(r"^\| condition", rules, re.MULTILINE)


def test_the_headline_of_models_without_results_is_all_of_them():
    runs = [made(0, 42), made(1, 42)]
    runs[1].results = None
    assert headline(runs) == runs
