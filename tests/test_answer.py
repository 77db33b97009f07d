"""Every row of the table "What is concluded" in DEFINITIONS.md, with made-up results."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_runs import diverged, made, pairs

import answer as module
from answer import METRICS, PRIMARY, answer, findings
from report import comparison_table
from sets import headline
from tables import figure


def said(runs):
    return " ".join(answer(runs, findings(runs)))


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
            "Softmax1 and softmax0 are equivalent in what quantization costs (TOST, margin ±0.01 nats): over 3 pairs",
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
    comparison = findings(runs)[0].compared["softmax1"][PRIMARY]
    assert comparison.difference == pytest.approx(np.mean(after) - np.mean(before))
    if comparison.low is None:
        assert "no spread over 3 pairs" in text and "p =" not in text
    else:
        assert f"95% interval from {figure(comparison.low)} to {figure(comparison.high)}" in text and "p = " in text
    # Equivalence stands beside the interval that shows it.
    assert ("for equivalence: 90% interval from" in text) == ("are equivalent" in text)
    # What is undecided says what could have been shown; nothing else does.
    effect = f"3 pairs would show a true difference of {figure(comparison.detectable)} nats in 80% of cases."
    assert (effect in text) == (begins.startswith("Undecided") and comparison.detectable is not None)


def test_a_small_mean_with_a_wide_interval_is_not_called_equivalent():
    """A difference of -.0095 with an interval from -.0170 to -.0020 is shown, and may be beyond the margin."""
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


def test_a_smaller_gap_is_qualified_where_the_quantized_model_is_not_better():
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


def with_losses(runs, of_arm):
    """Replace the quantized losses of the second arm, and keep the gaps."""
    for run, loss in zip([run for run in runs if run.arm != "softmax0"], of_arm, strict=True):
        run.damage["schemes"]["w8a8_static"]["loss"] = loss
    return runs


EQUIVALENT = ([0.500, 0.601, 0.700], [0.501, 0.600, 0.700])


@pytest.mark.parametrize(
    ("gaps", "quantized", "said_of_it"),
    [
        (LESS[::-1], [2.0, 2.3, 2.05], "more harmful here, but the quantized model is better: over"),
        (LESS[::-1], [3.0, 4.2, 9.1], "more harmful here, but the quantized model is no worse (its loss is not shown"),
        (EQUIVALENT, [4.5, 4.7, 4.8], "nats), but the quantized model is worse with softmax1: over"),
        (EQUIVALENT, [2.5, 2.7, 2.8], "nats), but the quantized model is better with softmax1: over"),
        (([1.0, 2.0, 3.0], [3.0, 2.0, 1.5]), [9.0, 9.5, 11], "Undecided, but the quantized model is worse with soft"),
        (([0.5, 0.601, 0.7], [0.495, 0.5961, 0.6951]), [4.5, 4.7, 4.8], "0.01 nats, but the quantized model is worse"),
        (([0.5, 0.601, 0.7], [0.495, 0.5961, 0.6951]), [2.5, 2.7, 2.8], "0.01 nats, but the quantized model is better"),
        (EQUIVALENT, [3.5, 3.6, 3.71], None),
        (LESS, [2.0, 2.3, 2.05], None),
        (LESS[::-1], [7.0, 7.3, 7.05], None),
    ],
)
def test_the_quantized_loss_qualifies_every_verdict(gaps, quantized, said_of_it):
    text = said(with_losses(pairs(*gaps), quantized))
    assert said_of_it in text if said_of_it else ", but" not in text


def test_two_pairs_are_named_with_their_t():
    text = said(pairs([2.0, 2.1], [1.0, 1.101]))
    assert text.startswith(
        "Softmax1 makes quantization less harmful here, from two pairs only (t = 12.7): over 2 pairs"
    )
    assert said(pairs([2.0, 2.1], [1.0, 2.5])).startswith("Undecided, from two pairs only (t = 12.7): over 2 pairs")


# ----------------------------------------------------------------------------------------------------------- one pair


def test_one_pair_is_described_without_a_test():
    text = said(pairs([2.0], [1.0]))
    assert text.startswith(
        "Open: one pair of 3,000 steps (seed 42), no test. In it static W8A8 quantization costs softmax1 1.00 nats of "
        "held-out loss, softmax0 2.00, a difference of -1.00 nats; loss after quantization: softmax1 4.00 nats, "
        "softmax0 5.00, "
    )
    assert text.endswith("Nothing can be concluded about softmax1 beyond this pair.") and "interval" not in text


def test_one_pair_with_a_loss_that_is_not_finite():
    text = said(pairs([NAN], [1.0]))
    assert text.startswith(
        "Open: one pair of 3,000 steps (seed 42), no test. softmax0's loss after quantization is not finite in the one"
    )
    text = said([made(0, 42), diverged(1, 42)])
    assert text == (
        "None about softmax1: both arms were trained in 0 of one pair of 3,000 steps. Softmax0 diverged in training in "
        "0 of 1 pair, softmax1 in 1, before any quantization (seed 42: softmax1 diverged at step 1,200)."
    )


# ------------------------------------------------------------------------------------------- what is no number, or fell


def test_losses_that_are_not_finite_are_ranked():
    text = said(pairs([NAN, math.inf, 1.0], [1.0, 1.0, 2.0]))
    assert text.startswith(
        "Undecided, over 3 pairs of 3,000 steps: softmax0's loss after quantization is not finite in 2 of 3 pairs "
        "(seed 42, 43). A loss that is not finite counts as worse than every finite one: static W8A8 quantization "
        "costs softmax1 less than softmax0 in 2 of 3 pairs and more in 1 (exact two-sided sign test over seeds, p = "
        "1; 3 pairs cannot give less than p = 0.25)."
    )
    text = said(pairs([NAN] * 6, [1.0] * 6))
    assert (
        text.startswith("Softmax1 makes quantization less harmful here, over 6 pairs of 3,000 steps: softmax0's")
        and "p = 0.031" in text
    )
    text = said(pairs([1.0] * 6, [NAN] * 6))
    assert (
        text.startswith("Softmax1 makes quantization more harmful here, over 6 pairs of 3,000 steps: softmax1's")
        and "p = 0.031" in text
    )
    text = said(pairs([NAN, NAN, 1.0], [NAN, 1.0, 0.5]))
    assert "in 2 of 3 pairs and more in 0, 1 tied and left out" in text


def test_a_divergence_in_training_is_not_damage_by_quantization():
    """softmax0 diverged in 6 of 8 pairs, softmax1 in none: these runs of softmax0 have no model to quantize."""
    runs = pairs([0.5, 0.6], [0.5, 0.6])
    runs += [run for seed in range(60, 66) for run in (diverged(0, seed), made(1, seed))]
    text = said(runs)
    assert text.startswith("Undecided: over 2 pairs of 3,000 steps in which both arms were trained static W8A8")
    assert "harmful" not in text and "nothing to rescue" not in text
    assert (
        " Softmax0 diverged in training in 6 of 8 pairs, softmax1 in 0, before any quantization: sign test p = 0.031 "
        "(seed 60: softmax0 diverged at step 1,200; seed 61: "
    ) in text
    comparison = findings(runs)[0].compared["softmax1"][PRIMARY]
    assert (comparison.seeds, comparison.baseline_not_finite, comparison.not_finite) == ([42, 43], [], [])
    # A loss of a trained model that is not finite stays in the sign test, over the pairs that were trained.
    text = said([*pairs([NAN] * 6, [1.0] * 6), made(0, 60), diverged(1, 60)])
    assert text.startswith(
        "Softmax1 makes quantization less harmful here, over 6 pairs of 3,000 steps in which both arms were trained: "
    )
    assert (
        "in 6 of 6 pairs and more in 0" in text
        and "Softmax0 diverged in training in 0 of 7 pairs, softmax1 in 1" in text
    )
    # Pairs in which both diverged decide nothing; a run without a partner is in no pair, and named all the same.
    both = said([*pairs(*LESS), diverged(0, 60), diverged(1, 60, step=7)])
    assert "softmax1 in 1, before any quantization: sign test p = 1 (seed 60: softmax0" in both
    assert "(seed 61, without a pair: softmax0 diverged at step 1,200)" in said([*pairs(*LESS), diverged(0, 61)])
    assert "diverged" not in said(pairs(*LESS))


def test_pairs_that_were_not_measured_are_not_called_untrained():
    text = said([*pairs(*LESS), made(0, 60), made(1, 60, None)])
    assert text.startswith(
        "Softmax1 makes quantization less harmful here: over 3 pairs of 3,000 steps in which it was measured static"
    )


@pytest.mark.parametrize("in_pair", [True, False])
def test_an_arm_that_diverged_is_not_harmless(in_pair):
    harmless = pairs([0.0020, 0.0021, 0.0010], [-0.0010, -0.0009, -0.0021])
    assert "nothing to rescue, quantization harms neither" in said(harmless)
    assert "nothing to rescue" not in said([*harmless, diverged(0, 60), *[made(1, 60)] * in_pair])
    text = said([*harmless, diverged(1, 60), *[made(0, 60, 0.0015)] * in_pair])
    assert text.startswith("There is nothing to rescue in softmax0 (upper") and "harms neither" not in text


def test_two_diverged_models():
    text = said([diverged(0, 42), diverged(1, 42)])
    assert text.startswith(
        "None about softmax1: both arms were trained in 0 of one pair. Softmax0 diverged in training"
    )
    text = said([diverged(n, seed) for n in (0, 1) for seed in (42, 43)])
    assert text.startswith("None about softmax1: both arms were trained in 0 of 2 pairs. Softmax0 diverged in training")
    assert "in 2 of 2 pairs, softmax1 in 2, before any quantization: sign test p = 1 (" in text
    assert "nothing to rescue" not in text


def test_an_arm_whose_runs_all_diverged_does_not_count_for_the_correction():
    halves = [diverged(0.5, seed) for seed in (42, 43, 44)]
    twos = [made(2, seed, gap) for seed, gap in zip((42, 43, 44), (1.0, 1.2, 1.1), strict=True)]
    finding = findings([*pairs(*LESS), *halves, *twos])[0]
    assert list(finding.compared) == ["softmax1", "softmax2"]
    assert finding.compared["softmax2"][PRIMARY].confidence == pytest.approx(0.95)
    assert "None about softmax0.5: both arms were trained in 0 of 3 pairs" in " ".join(
        answer(finding.group.runs, [finding])
    )


# ----------------------------------------------------------------------------------------- the instrument and its noise


def with_floors(runs, floor, arm):
    for run in runs:
        for scheme in run.damage["schemes"].values():
            scheme["floor"] = floor if run.arm == arm else 1e-9
    return runs


def test_a_mean_gap_below_its_noise_is_not_printed():
    runs = with_floors(pairs([0.010, -0.012, 0.011], [1.0, 1.2, 1.1]), 0.03, "softmax0")
    compared = findings(runs)[0].compared["softmax1"]
    assert compared[PRIMARY].baseline_floor == pytest.approx(0.03 / math.sqrt(3))  # sqrt(3 * 0.03^2) / 3
    assert (
        "costs softmax1 1.10 ± 0.1000 nats of held-out loss, softmax0 an amount below its noise of 0.0173 nats ("
        in (said(runs))
    )
    row = comparison_table(compared, "softmax1", [PRIMARY])
    assert "| below its noise of 0.0173 |" in row and "1.10 ± 0.10" in row
    runs = with_floors(pairs([1.0], [0.001]), 0.002, "softmax1")
    assert "costs softmax1 an amount below its noise of 0.0020 nats of held-out loss, softmax0 1.00, a" in said(runs)
    assert "below its noise" not in said(with_floors(pairs([1.0], [0.001]), 0.0005, "softmax1"))
    del runs[1].damage["schemes"]["w8a8_static"]["floor"]  # unknown: nothing is claimed
    assert findings(runs)[0].compared["softmax1"][PRIMARY].floor is None and "below its noise" not in said(runs)


def checked(runs, *passed):
    for run, verdict in zip(runs, passed, strict=False):
        run.damage["self_check"] = {"passed": verdict}
    return runs


def test_a_failed_self_check_stops_the_answer():
    text = said(checked(pairs(*LESS), True, False))
    assert text.startswith("None: the instrument failed its own check on esperberto-softmax1-seed42, so")
    assert "harmful" not in text and "p =" not in text
    assert said(checked(pairs(*LESS), True, True)) == said(checked(pairs(*LESS), True, None)) == said(pairs(*LESS))
    toys = checked(pairs(*LESS, training__steps=600), True, False)
    text = said(pairs(*LESS) + toys)
    assert (
        text.startswith("Softmax1 makes") and "Another set of 6 runs of 600 steps: None: the instrument failed" in text
    )


def test_an_undecided_control_is_reported():
    ends = (
        " The positive control is undecided on these models: they have learnt too little that quantization could "
        "destroy."
    )
    assert said(checked(pairs(*LESS), None, None)) == said(pairs(*LESS)) + ends


# ------------------------------------------------------------------------------------------------- which runs and arms


def test_no_pair():
    assert said([made(0, 42)]).startswith("None: there is no pair here")
    assert said([made(0, 42), made(1, 43)]).startswith("None: there is no pair here")
    assert said([]).startswith("None: there is no pair here")
    assert "was not measured" in said([made(0, 42, None), made(1, 42, None)])


def test_test_runs_give_no_answer_and_change_no_other():
    smoke = pairs([1.0], [2.0], test_pipeline=True)
    assert said(smoke).startswith("None: --test_pipeline made these runs")
    real = pairs(*LESS)
    assert said(real + smoke) == said(smoke[:1] + real) == said(real)


def test_the_set_that_is_trained_longest_comes_first():
    full = pairs([2.0], [1.0], training__steps=285_899)
    short = [made(0, 1, training__steps=600), made(1, 2, training__steps=600), made(1, 3, training__steps=600)]
    assert said(full + short) == said(full)
    assert "Open: one pair of 285,899 steps" in said(full)
    toys = pairs(*LESS, training__steps=600)
    assert said(toys + full) == f"{said(full)} Another set of 6 runs of 600 steps: {said(toys)}"


def test_a_longer_run_without_a_pair_is_named():
    full = pairs(*LESS)
    alone = made(0, 42, training__steps=285_899)
    said_of_it = (
        " esperberto-softmax0-seed42-285899 was trained on more (285,899 steps of 16 sequences), but has no pair: it "
        "is not compared."
    )
    assert said([*full, alone]) == said(full) + said_of_it
    shorter = made(0, 43, training__steps=600)
    assert said([*full, shorter, made(1, 99, 9.0)]) == said(full)  # trained on less, and in the set itself
    assert said([*full, made(0, 42, training__steps=10**6, test_pipeline=True)]) == said(full)
    batch = made(0, 42, effective_batch_size=32)
    assert "was trained on more (3,000 steps of 32 sequences)" in said([*full, batch])


def test_other_arms_are_exploratory_and_share_the_error():
    halves = [made(0.5, seed, gap) for seed, gap in zip((42, 43, 44), (1.0, 1.2, 1.1), strict=True)]
    twos = [made(2, seed, gap) for seed, gap in zip((42, 43, 44), (1.0, 1.2, 1.1), strict=True)]
    runs = pairs(*LESS)
    first, second = said(runs + halves).split(" Exploratory: ")
    assert first == said(runs) and second.startswith("Softmax0.5 makes quantization less harmful here")
    assert "95% interval" in second and "Bonferroni" not in second
    compared = findings(twos + runs + halves)[0].compared
    assert list(compared) == ["softmax1", "softmax2", "softmax0.5"]
    assert [metrics[PRIMARY].confidence for metrics in compared.values()] == pytest.approx([0.95, 0.975, 0.975])
    text = said(runs + halves + twos)
    assert text.count("Exploratory: ") == 2 and text.count("corrected for 2 exploratory arms, Bonferroni") == 2
    assert text.count("97.5% interval from") == 4  # of the gap and of the loss, in either arm
    paragraphs = answer(runs + halves + twos, findings(runs + halves + twos))
    assert [text.startswith("Exploratory: ") for text in paragraphs] == [False, True, True]
    alone = said([run for run in runs if run.arm == "softmax0"] + halves)
    assert alone.startswith("None about softmax1, the arm named beforehand: it has no pair here. Exploratory: ")


def test_arms_with_nearly_equal_n_have_different_names():
    runs = [*pairs(*LESS), *(made(1.0000001, seed) for seed in (42, 43, 44))]
    assert list(findings(runs)[0].compared) == ["softmax1", "softmax1.0000001"]


def test_the_class_of_a_model_does_not_matter():
    """n = 1e-30 is softmax in another class: equal figures give no difference, whatever the name of the class."""
    text = said(pairs([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], n=1e-30))
    assert "no spread over 3 pairs" in text and "Exploratory: Undecided" in text
    tiny_n = said(pairs(*LESS, n=1e-30)).replace("oftmax1e-30", "oftmax0.5")
    assert tiny_n == said(pairs(*LESS, n=0.5))


# -------------------------------------------------------------------------------------------------- interval over texts


def test_the_interval_over_texts_is_printed_too(monkeypatch):
    """With several pairs, the losses of each text are averaged first: all runs score the same texts."""

    def bootstrap(before, after, scheme):
        gap = [np.subtract(losses["texts"][scheme], losses["texts"]["float32"]) for losses in (before, after)]
        gap = np.sum(gap[1] - gap[0]) / np.sum(before["masked"])
        return gap - 1, gap + 1

    monkeypatch.setattr(module, "bootstrap_difference", bootstrap)

    def with_texts(runs):
        for run in runs:
            gap = run.damage["schemes"]["w8a8_static"]["gap"]
            run.damage |= {"masked": [4, 6], "texts": {"float32": [1.0, 2.0], "w8a8_static": [1.0 + 10 * gap, 2.0]}}
        return runs

    runs = with_texts(pairs([2.0], [1.5]))
    assert "(95% interval over texts, this pair only: -1.50 to 0.50)" in said(runs)
    runs = with_texts(pairs(*LESS))
    compared = findings(runs)[0].compared["softmax1"]
    assert (compared[PRIMARY].texts_low, compared[PRIMARY].texts_high) == pytest.approx((-2, 0))
    assert "; 95% interval over texts: -2.00 to 0.00; " in said(runs)
    rows = comparison_table(compared, "softmax1", METRICS).splitlines()
    assert rows[0].rstrip("| ").endswith("95% interval over texts")
    assert [row.rstrip("| ")[-13:] for row in rows[2:4]] == ["-2.00 to 0.00", rows[3].rstrip("| ")[-13:]]
    assert all(row.rstrip("| ").endswith("–") for row in rows[3:])
    runs[0].damage["masked"] = [5, 5]  # other texts: they cannot be drawn together
    assert "over texts" not in said(runs)


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_comparison_table_has_rows_without_an_interval():
    runs = pairs([NAN, 1.0, 2.0], [0.5, 0.5, 0.5])
    (compared,) = (finding.compared["softmax1"] for finding in findings(runs))
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in
             comparison_table(compared, "softmax1", METRICS).splitlines()]  # fmt: skip
    gap = next(row for row in table if row[0].startswith("**W8A8 static"))
    assert gap[1:] == [
        "not finite in 1 of 3",
        "0.50 ± 0.00",
        "–",
        "not finite in 1 of 3 pairs; sign test, p = 0.25",
        "–",
    ]
    assert next(row for row in table if row[0].startswith("heads that do nothing"))[4] == "no spread over 3 pairs"


def test_every_rule_is_written_down():
    """The table in DEFINITIONS.md contains the phrases that the code prints."""
    text = (Path(module.__file__).parent / "DEFINITIONS.md").read_text(encoding="utf-8")
    rules = text.partition("## What is concluded")[2].partition("\n## ")[0]
    for phrase in (
        "less harmful here", "though perhaps by less than the margin", "differs, by less than the margin",
        "are equivalent in what quantization costs (TOST",
        "Undecided", "There is nothing to rescue in softmax0", "quantization harms neither",
        "but the quantized model is worse", "but the quantized model is no better", "from two pairs only",
        "Open: one pair", "is not finite in", "diverged at step", "diverged in training in",
        "both arms were trained in 0 of", "Exploratory:", "None: there is no pair here",
        "None: --test_pipeline made these runs", "Another set of", "no spread over", "in 80% of cases",
        "None about softmax1", "but the quantized model is better", "but the quantized model is no worse",
        "below its noise of", "None: the instrument failed its own check on", "was trained on more",
        "The positive control is undecided on these models", "before any quantization", "counts as worse than every",
        "pairs of S steps", "in which both arms were trained", "in which it was measured",
    ):  # fmt: skip
        assert phrase in rules, phrase
    assert f"{module.MARGIN:g} nats" in rules
    assert re.search(r"^\| condition", rules, re.MULTILINE)


def test_models_without_results_are_all_in_the_headline():
    runs = [made(0, 42), made(1, 42)]
    runs[1].results = None
    assert headline(runs) == runs
