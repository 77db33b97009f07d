"""The pictures of the report: what is drawn, from runs with made-up figures."""

import math

import numpy as np
import pytest
from made_runs import diverged, made

import pictures
import plots
from runs import BINS

EIGHT = ["clipped", "softmax0", "softmax0.1", "softmax0.5", "softmax1", "softmax4", "softmax_learned", "gated"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in order; the bytes of a picture are its number."""
    drawn = []

    def keep(figure):
        plots.plt.close(figure)
        drawn.append(figure)
        return str(len(drawn) - 1).encode()

    monkeypatch.setattr(plots, "_png", keep)
    return drawn


def watched(n, seed, **changes):
    """A run with what is watched during training: step / 1000 in layer 0 and one more in layer 1."""
    emergence = [
        {"step": step, **{f"layer.{i}.{name}": step / 1e3 + i for i in range(2) for name in keys}}
        for keys in [pictures.EMERGING | pictures.SEEDS]
        for step in (0, 1000, 3000)
    ]
    run = made(n, seed, emergence=emergence, emergence_texts=64, **changes)
    weights = np.full((3, 3), 0.1 if n else 0.2)
    run.maps = [("layer 1, head 0", ["<s>", "la", "</s>"], weights, 1 - weights.sum(1))] * 2
    run.histograms = {"layer 0": np.histogram([0.0, 1.0, -1.0, 9.0], BINS)[0]}
    run.damage["masked"] = [1, 2, 1, 2]
    run.damage["texts"] = {"float32": [3.0, 6.0, 3.0, 6.0], "w8a8_static": [3.5, 7.0, 3.5, 7.0]}
    return run


def named(found, figures):
    """{file name: figure}"""
    return {name: figures[int(picture.png)] for name, picture in found.items()}


def lines(axes):
    """{label: (x, y)} of the lines that have one."""
    return {line.get_label(): line.get_data() for line in axes.get_lines() if not line.get_label().startswith("_")}


# ------------------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("arms", [(0,), (0, 1), (0, 0.5, 1, 2, 4, 8)])
def test_every_picture_has_a_short_title_and_a_caption(figures, arms):
    """With one, two and six arms of two seeds; one run has diverged."""
    runs = [watched(n, seed) for n in arms for seed in (42, 43)] + [diverged(1, 44)]
    found = pictures.pictures(runs, 4)
    assert list(found) == [
        *("emergence_seeds.png", "loss.png", "damage.png", "kurtosis.png", "norms.png", "histograms.png"),
        *("attention_map.png", "emergence.png"),
    ]
    assert "Thin lines are runs" in found["emergence_seeds.png"].caption
    for name, figure in named(found, figures).items():
        titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        assert max(map(len, titles)) <= 50 and any(titles), name
        assert len(found[name].title) <= 50 and found[name].caption.endswith("."), name
        assert name == "attention_map.png" or figure.axes[0].get_ylabel() + figure.axes[0].get_xlabel(), name


def test_pictures_are_png_whatever_an_arm_is_called():
    run = watched(0, 42)
    run.name, run.results = r"a-model-of-somebody-else-$\frac$-with-a-long-name", None  # an arm by itself
    run.maps[0][1][1] = "$$"
    found = pictures.pictures([run, watched(1, 42)], 4)
    assert len(found) == 8 and all(picture.png.startswith(b"\x89PNG") for picture in found.values())


def test_an_arm_looks_the_same_in_every_picture_and_the_two_in_question_lead():
    looks = plots.looks(EIGHT, pictures.LEADING)
    assert list(looks)[:2] == ["softmax0", "softmax1"]
    for what in ("colour", "marker"):
        assert len({getattr(look, what) for look in looks.values()}) == 8
    assert [arm for arm, look in looks.items() if look.leading] == ["softmax0", "softmax1"]
    two = plots.looks(["softmax1", "softmax0"], pictures.LEADING)
    assert two == {arm: looks[arm] for arm in ("softmax0", "softmax1")}
    assert all(look.leading for look in plots.looks(["a", "b"], pictures.LEADING).values())
    assert all(look.leading for look in plots.looks(list("abcdefghi"), pictures.LEADING).values())  # more than colours


def test_the_median_of_an_arm_and_its_runs_are_drawn(figures):
    """A step that a run did not reach, or where it is no number, does not count for that run."""
    curves = [("softmax0", values, [0, 1, 2][: len(values)]) for values in ([1, 5, 9], [2, 6, 7], [6, math.nan])]
    curves += [("gated", [3, 9], [0, 1]), ("gated", [5], [0])]  # half of the runs is not enough
    looks = plots.looks(EIGHT, pictures.LEADING)
    plots.panels({"place": curves}, looks, "title", "step", {"place": ("label", "linear")})
    axes = figures[0].axes[0]
    drawn = lines(axes)
    assert [one.tolist() for one in map(np.array, drawn["softmax0"])] == [[0, 1, 2], [2, 5.5, 8]]
    assert drawn["gated"][1].tolist() == [4]
    thin = [line for line in axes.get_lines() if line.get_label().startswith("_")]
    assert [line.get_ydata().tolist()[:2] for line in thin[:2]] == [[1, 5], [2, 6]] and len(thin) == 3  # no gated one
    assert all(line.get_zorder() < axes.get_lines()[-1].get_zorder() for line in thin)  # behind every median


# --------------------------------------------------------------------------------------------------------- in training


def test_emergence_starts_before_the_first_update_and_says_of_which_texts(figures):
    found = pictures.pictures([watched(0, 42), watched(1, 42)], 4)
    figure = named(found, figures)["emergence.png"]
    panels = {axes.get_title(): axes for axes in figure.axes}
    steps, values = lines(panels["null mass"])["softmax0"]
    assert (list(steps), values.tolist()) == ([0, 1000, 3000], [50, 150, 350])  # % means of two layers
    assert lines(panels["FFN output: norm"])["softmax1"][1].tolist() == [1, 2, 4]  # the larger of two layers
    assert "64 texts evenly spread over the held-out split, unmasked" in found["emergence.png"].caption
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *("excess kurtosis", "", "infinity norm", "", "% of heads and texts", "% of the attention")
    ]  # a panel without a label shares the scale of its neighbour
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_every_seed_of_both_arms_is_drawn_and_the_median_of_each_arm(figures):
    """Step 0 first, and a run that diverged does not cut the others' median."""
    steps = [0, 100, 200]
    seeds = {"softmax0": ([0, 1, 9], [0, 2, 8], [0, 3]), "softmax1": ([0, 1, 1], [0, 1, 3])}
    seeds |= {arm: ([0, 5, 5], [0, 7, 7]) for arm in ("softmax4", "gated")}
    curves = [(arm, values, steps[: len(values)]) for arm, runs in seeds.items() for values in runs]
    axes_of = {"sinks": ("%", "linear"), "norm": ("norm", "log")}
    both = {"sinks": curves, "norm": [(arm, [value + 1 for value in values], at) for arm, values, at in curves]}
    plots.bundles(both, plots.looks(list(seeds), pictures.LEADING), axes_of)
    first = figures[0].axes[0]
    thin = [list(line.get_ydata()) for line in first.get_lines() if line.get_label().startswith("_")]
    assert sorted(thin) == sorted([*seeds["softmax0"], *seeds["softmax1"]])  # of other arms the median alone
    medians = {line.get_label(): line for line in first.get_lines() if not line.get_label().startswith("_")}
    assert {label: line.get_ydata().tolist() for label, line in medians.items()} == {
        "softmax0: median of 3 runs": [0, 2, 8.5],
        "softmax1: median of 2 runs": [0, 1, 2],
        "softmax4: median of 2 runs": [0, 6, 6],
        "gated: median of 2 runs": [0, 6, 6],
    }
    widths = [line.get_linewidth() for line in medians.values()]
    assert min(widths[:2]) > 2 * max(widths[2:])


def test_the_first_picture_is_of_sinks_in_percent_and_of_the_largest_layer(figures):
    found = pictures.pictures([watched(0, 42), watched(1, 42)], 4)
    assert next(iter(found)) == "emergence_seeds.png" and "64 held-out texts" in found["emergence_seeds.png"].caption
    assert "Thin line" not in found["emergence_seeds.png"].caption  # every arm has one run
    sinks, norm = named(found, figures)["emergence_seeds.png"].axes
    assert lines(sinks)["softmax0: one run"][1].tolist() == [50, 150, 350]  # the mean of two layers
    assert lines(norm)["softmax1: one run"][1].tolist() == [1, 2, 4]  # the larger of two layers


def test_the_lower_panel_of_the_loss_is_the_difference_to_softmax0_of_the_same_seed(figures):
    histories = {  # of two seeds; one of them has a run that diverged after step 100
        (0, 42): [[100, 4.0], [200, 3.0]],
        (1, 42): [[100, 4.5], [200, 3.25]],
        (0, 43): [[100, 5.0], [200, 2.0]],
        (1, 43): [[100, 5.25], [200, None]],
    }
    runs = [made(n, seed, validation_loss_history=history) for (n, seed), history in histories.items()]
    runs.append(made(0.5, 44, validation_loss_history=[[100, 9.0]]))  # without a partner
    looks = plots.looks(["softmax0", "softmax1", "softmax0.5"], pictures.LEADING)
    pictures.loss(runs, looks)
    upper, lower = figures[0].axes
    assert lines(upper)["softmax0"][1].tolist() == [4.5, 2.5]
    assert {arm: values.tolist() for arm, (_, values) in lines(lower).items()} == {"softmax1": [0.375, 0.25]}
    pictures.loss([runs[0]], looks)
    assert len(figures[1].axes) == 1  # nothing to compare with
    caption = pictures.loss([*runs, diverged(1, 45)], looks).caption
    assert "esperberto-softmax1-seed45-1200 diverged at step 1,200." in caption


# ----------------------------------------------------------------------------------------------------- finished models


def test_damage_is_in_millinats_with_the_interval_over_texts_of_the_mean_of_an_arm(figures):
    first, second = watched(0, 42, gap=0.5), watched(0, 43, gap=0.1)
    second.damage["texts"]["w8a8_static"] = [3.1, 6.2, 3.1, 6.2]
    runs = [first, second, watched(1, 42)]
    # 0.5 and 0.1 nats a token in every text: there is nothing to resample, and the mean has no width.
    assert pictures.over_texts(runs[:2], "w8a8_static") == pytest.approx((0.3, 0.3))
    looks = plots.looks(["softmax0", "softmax1"], pictures.LEADING)
    picture = pictures.damage(runs, looks)
    assert "in thousandths of a nat" in picture.caption and "95% interval over texts" in picture.caption
    axes = figures[0].axes[0]
    drawn = [line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else line.get_xdata()
             for line in axes.get_lines() if line.get_marker() in ("o", "s", "None")]  # fmt: skip
    assert any(np.allclose(sorted(one), [100, 500]) for one in drawn if len(one) == 2)  # a mark a run
    assert any(np.allclose(one, [300, 300]) for one in drawn if len(one) == 2)  # the interval
    first.damage["texts"]["w8a8_static"] = [3.0, 8.0, 3.0, 6.0]
    low, high = pictures.over_texts([first], "w8a8_static")
    assert low == 0 and 0.3 < high <= 1  # two nats in one text of two masked tokens
    first.damage["masked"] = [2, 2, 1, 1]
    assert pictures.over_texts([first, second], "w8a8_static") is None  # other masks
    assert pictures.over_texts([made(0, 42)], "w8a8_static") is None  # losses of texts are not known


def test_a_run_whose_damage_is_no_number_leaves_its_arm_without_a_mean(figures):
    runs = [watched(0, 42, gap=math.nan), watched(0, 43, gap=0.2), watched(1, 42), diverged(1, 43)]
    runs[0].damage["texts"]["w8a8_static"] = [math.nan] * 4
    picture = pictures.damage(runs, plots.looks(["softmax0", "softmax1"], pictures.LEADING))
    axes = figures[0].axes[0]
    assert not any(line.get_markersize() == 7 and line.get_marker() == "o" for line in axes.get_lines() if
                   len(line.get_xdata()))  # fmt: skip
    assert "esperberto-softmax0-seed42, W8A8, static per tensor (not finite)" in picture.caption
    assert "esperberto-softmax1-seed43-1200 (diverged)" in picture.caption
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["softmax0", "softmax1"]


def test_the_damage_picture_takes_gaps_of_any_size():
    gaps = {
        "a": {"softmax0": ([1.5, 1.2], (1.1, 1.6)), "softmax1": ([0.001], None)},
        "b": {"softmax0": ([math.nan], None), "softmax1": ([-0.002], (-0.004, 0.0))},
        "c": {"softmax0": ([math.inf], None)},
    }
    looks = plots.looks(["softmax0", "softmax1"], pictures.LEADING)
    for some in (gaps, {"b": {"softmax0": ([math.nan], None)}}):
        assert plots.damage(some, looks).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["kurtosis.png", "norms.png"])
def test_all_places_share_one_scale_and_a_gaussian_is_drawn(figures, name):
    runs = [watched(0, 42), watched(1, 42, size=5000.0)]
    figure = named(pictures.pictures(runs, 4), figures)[name]
    assert len(figure.axes) == len(pictures.PANELS) and len({axes.get_ylim() for axes in figure.axes}) == 1
    low, high = figure.axes[0].get_ylim()
    assert high > 5000 and figure.axes[0].get_yscale() == ("symlog" if name == "kurtosis.png" else "log")
    assert all(("Gaussian" in lines(axes)) == (name == "kurtosis.png") for axes in figure.axes)
    assert low < 0 or name == "norms.png"


def test_the_scale_of_the_attention_maps_ends_at_their_largest_weight(figures):
    """Two arms side by side on both texts, more arms on the first text alone."""
    looks = plots.looks(["softmax0", "softmax1"], pictures.LEADING)
    runs = [watched(1, 42), watched(0, 42)]
    pictures.attention_map(runs, looks)
    images = [axes.get_images()[0] for axes in figures[0].axes if axes.get_images()]
    assert len(images) == 4 and [image.norm.vmax for image in images] == pytest.approx(
        [0.7] * 4
    )  # softmax1's null mass
    titles = [axes.get_title() for axes in figures[0].axes[:2]]
    assert titles == ["softmax0: layer 1, head 0\nnull mass 40%", "softmax1: layer 1, head 0\nnull mass 70%"]
    pictures.attention_map(runs[1:], looks)
    assert figures[1].axes[0].get_images()[0].norm.vmax == pytest.approx(0.4)
    arms = (0, 0.5, 1, 4)
    pictures.attention_map([watched(n, 42) for n in arms], plots.looks([f"softmax{n}" for n in arms], ()))
    assert sum(bool(axes.get_images()) for axes in figures[2].axes) == 4


def test_the_density_of_an_arm_is_the_mean_over_its_runs(figures):
    runs = [watched(0, 42), watched(0, 43)]
    runs[1].histograms = {"layer 0": np.histogram([0.0] * 4, BINS)[0]}
    pictures.histograms(runs, plots.looks(["softmax0"], pictures.LEADING))
    x, density = lines(figures[0].axes[0])["softmax0"]
    width = BINS[1] - BINS[0]
    assert np.nansum(density) * width == pytest.approx(1)
    assert density[np.searchsorted(x, 0)] * width == pytest.approx((1 / 4 + 1) / 2)
