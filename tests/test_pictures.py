"""The pictures of the report and its page: what is drawn, from runs with made-up figures."""

import base64
import math

import numpy as np
import pytest
from made_runs import made
from matplotlib.axes import Axes

import pictures
import plots
from report import html_page


@pytest.fixture
def runs():
    """Both arms, with what is watched during training: step / 1000 in layer 0 and one more in layer 1."""
    emergence = [
        {"step": step, **{f"layer.{i}.{name}": step / 1e3 + i for i in range(2) for name in watched}}
        for watched in [pictures.EMERGING | pictures.SEEDS]
        for step in (0, 1000, 3000)
    ]
    return [made(n, 42, emergence=emergence, emergence_texts=64) for n in (0, 1)]


def test_emergence_starts_before_the_first_update_and_says_of_which_texts(runs, monkeypatch):
    drawn = {}

    def panels(curves, title, xlabel, ylabel):
        drawn[title.partition(":")[0]] = curves, title, ylabel
        return b"a picture"

    monkeypatch.setattr(plots, "panels", panels)
    pictures.pictures(runs, 4)
    curves, title, labels = drawn["Emergence"]
    assert curves["null mass"][0] == ("softmax0", [0.5, 1.5, 3.5], [0, 1000, 3000])  # means of two layers
    assert "64 texts evenly spread over the held-out split, unmasked" in title
    assert labels.keys() >= curves.keys() and all(labels.values())


def test_every_seed_of_both_arms_is_drawn_and_the_median_of_each_arm(monkeypatch):
    """By what matplotlib is told to draw; step 0 first, and a run that diverged does not cut the others' median."""
    drawn = []
    plot = Axes.plot

    def watched(self, *data, **look):
        drawn.append((self.get_title(), np.array(data[1], dtype=float).tolist(), look))
        return plot(self, *data, **look)

    monkeypatch.setattr(Axes, "plot", watched)
    steps = [0, 100, 200]
    seeds = {"softmax0": ([0, 1, 9], [0, 2, 8], [0, 3]), "softmax1": ([0, 1, 1],), "softmax4": ([0, 5, 5], [0, 7, 7])}
    curves = [(arm, values, steps[: len(values)]) for arm, runs in seeds.items() for values in runs]
    axes_of = {"sinks": ("%", "linear"), "norm": ("norm", "log")}
    both = {"sinks": curves, "norm": [(arm, [value + 1 for value in values], at) for arm, values, at in curves]}
    assert plots.bundles(both, ("softmax0", "softmax1"), axes_of).startswith(b"\x89PNG")
    first = [(values, look) for _, values, look in drawn[: len(drawn) // 2]]  # the first panel
    lines = [values for values, look in first if "label" not in look]
    assert sorted(lines) == sorted([*seeds["softmax0"], *seeds["softmax1"]])  # of other arms the median alone
    medians = {
        look["label"].partition(":")[0]: (values, look["linewidth"]) for values, look in first if "label" in look
    }
    assert {arm: values for arm, (values, _) in medians.items()} == {
        "softmax0": [0, 2, 8.5],
        "softmax1": [0, 1, 1],
        "softmax4": [0, 6, 6],
    }
    assert medians["softmax0"][1] > 2 * medians["softmax4"][1]


def test_the_first_picture_is_of_sinks_in_percent_and_of_the_largest_layer(runs, monkeypatch):
    drawn = {}

    def bundles(curves, bold, axes_of):
        drawn.update(curves=curves, bold=bold, axes_of=axes_of)
        return b"a picture"

    monkeypatch.setattr(plots, "bundles", bundles)
    made = pictures.pictures(runs, 4)
    assert next(iter(made)) == "emergence_seeds.png" and "64 held-out texts" in made["emergence_seeds.png"][0]
    sinks, norm = drawn["curves"].values()
    assert sinks[0] == ("softmax0", [50.0, 150.0, 350.0], [0, 1000, 3000])  # the mean of two layers
    assert norm[1] == ("softmax1", [1.0, 2.0, 4.0], [0, 1000, 3000])  # the larger of two layers
    assert drawn["bold"] == ("softmax0", "softmax1") and drawn["axes_of"].keys() == drawn["curves"].keys()


def test_the_damage_picture_takes_gaps_of_any_size():
    runs = [("softmax0", {"a": (1.5, 0.1), "b": (math.nan, math.nan), "c": (math.inf, math.nan)})]
    runs += [("softmax1", {"a": (0.001, math.nan), "b": (-0.002, 0.001), "c": (0.0, 0.0)})]
    for some in (runs, runs[:1], [("softmax0", {"a": (math.nan, math.nan)})]):
        assert plots.damage(some, "gaps").startswith(b"\x89PNG")


def test_the_page_holds_its_pictures():
    page = html_page("# T < U\n\n![a](a.png)\n\n| x |\n| - |\n| 1 |\n", {"a.png": b"picture"})
    assert "data:image/png;base64," + base64.b64encode(b"picture").decode() in page
    assert "<title>T &lt; U</title>" in page and '<div class="wide"><table>' in page
