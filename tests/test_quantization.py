"""Quantization: its grids by hand, which tensors are quantized, and that a broken layer is recognised."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import quantization
from held_out import held_out_loss, per_text_loss
from measurement import weight_statistics
from outliers import measure_model
from quantization import (
    SCHEMES,
    StaticW8A8,
    bootstrap_difference,
    dynamic_w8a8,
    gap_error,
    int4_weight,
    int8_rows,
    int8_weight,
    joined,
    measure_damage,
    measured_copy,
    mse_weight,
    published_weight,
    relative_error,
    with_rounded_weights,
)
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n, learned_sinks

VOCABULARY = 60
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,  # so activations with 32 channels are as large as those of large models
}
PARTS = ["embeddings", "layer.0", "layer.1", "layer.2", "head"]


def batches(count, seed, width=12):
    """Sequences that count upwards from one of three first numbers, which unmasked tokens reveal; some are padded."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        start = 11 * torch.randint(0, 3, (8, 1), generator=generator)
        ids = 5 + start + torch.arange(width)
        ids[:, 0] = 0
        mask = torch.ones_like(ids)
        mask[0, width // 2 :], ids[0, width // 2 :] = 0, 1
        labels = torch.full_like(ids, -100)
        chosen = (torch.rand(ids.shape, generator=generator) < 0.2) & mask.bool()
        chosen[:, 0], chosen[:, 3] = False, True
        labels[chosen] = ids[chosen]
        ids[chosen] = 4
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def known_text():
    """Two draws of calibration batches, and calibration batches for the published setting."""
    return [batches(4, seed=3), batches(4, seed=4)], batches(4, seed=5)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SMALL))
    if kind == "softmax1":
        return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**SMALL, softmax_n=1.0))
    if kind == "learned":  # n from 0.1 to 55
        model = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**SMALL, softmax_n="learned"))
        for log_n in learned_sinks(model).values():
            torch.nn.init.uniform_(log_n, -2.3, 4.0)
        return model
    return RobertaForMaskedLM(RobertaConfig(**SMALL))


def learn(model, steps=150):
    """Train `model` in place on the sequences above; returns it in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in batches(steps, seed=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert held_out_loss(model, batches(4, seed=2))[0] < 1.0  # ln 60 = 4.1 before training
    return model


@pytest.fixture(scope="module", params=["softmax0", "softmax1"])
def trained(request):
    """A small model that has learnt its task, so that quantization can damage it."""
    return learn(model_of(request.param))


# --------------------------------------------------------------------------------------------------------------- grids


def test_grids_by_hand():
    weight = torch.tensor([[127.0, 1.4, -0.6], [0.0, 0.5, -126.7]])
    assert int8_weight(weight).tolist() == [[127, 1, -1], [0, 0, -127]]
    rows = int8_rows(torch.tensor([[127.0, 1.4, -0.6], [0.0, 1.27, -0.123]]))
    torch.testing.assert_close(rows, torch.tensor([[127.0, 1, -1], [0.0, 1.27, -0.12]]))
    assert int4_weight(torch.tensor([[7.0, 3.4, -0.6, -7]])).tolist() == [[7, 3, -1, -7]]
    assert int8_weight(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3 and int4_weight(torch.zeros(3, 2)).sum() == 0
    assert relative_error(torch.tensor([3.0, 4]), torch.tensor([3.0, 3])) == 1 / 5
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_groups_of_four_bit_weights_are_rounded_by_themselves():
    weight = torch.ones(2, 2 * quantization.GROUP_SIZE)
    weight[0, 0] = 1000  # destroys its own group of 128 weights and no other
    rounded = int4_weight(weight)
    assert rounded[0, 1 : quantization.GROUP_SIZE].abs().sum() == 0
    torch.testing.assert_close(rounded[0, quantization.GROUP_SIZE :], weight[0, quantization.GROUP_SIZE :])
    assert int4_weight(torch.randn(3, 50)).shape == (3, 50)  # groups of 50


def test_rounding_errors_of_parameters():
    model = model_of("softmax0")
    statistics = weight_statistics(model)
    assert statistics.keys() == dict(model.named_parameters()).keys()
    weight = model.roberta.encoder.layer[0].output.dense.weight
    errors = statistics["roberta.encoder.layer.0.output.dense.weight"]
    scale = weight.abs().max() / 127
    by_hand = (weight - (weight / scale).round() * scale).norm() / weight.norm()
    assert errors["int8_error"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert errors["int4_error"] > 5 * errors["int8_error"]
    assert "int4_error" not in statistics["roberta.encoder.layer.0.output.dense.bias"]


# -------------------------------------------------------------------------------------------------------- W8A8, static


@pytest.mark.parametrize("kind", ["softmax0", "softmax1", "bert"])
def test_with_nothing_quantized_the_loss_is_that_of_the_model(kind):
    model = model_of(kind).eval()
    scored = batches(3, seed=2)
    static = StaticW8A8(model, batches(4, seed=3))
    with static.only("nothing") as exact:
        assert held_out_loss(exact, scored)[0] == pytest.approx(held_out_loss(model, scored)[0], rel=1e-5)
    assert static.parts == PARTS


def test_the_places_named_in_the_definition_are_quantized_and_on_their_grid():
    model = model_of("softmax1").eval()
    scored = batches(1, seed=2)
    static = StaticW8A8(model, batches(4, seed=3))
    layer = "roberta.encoder.layer.1"
    expected = {f"{layer}.attention.self.{what}" for what in ("scores", "weights", "context")}
    for name in ("query", "key", "value"):
        expected |= {f"{layer}.attention.self.{name}.input", f"{layer}.attention.self.{name}.output"}
    for name in ("attention.output.dense", "attention.output.LayerNorm", "output.dense", "output.LayerNorm"):
        expected |= {f"{layer}.{name}.input", f"{layer}.{name}.output"}
    expected |= {f"{layer}.intermediate.dense.input"}
    assert {name for name in static.ranges if name.startswith(layer)} == expected
    others = {name for name in static.ranges if ".layer." not in name}
    assert others == {f"roberta.embeddings.LayerNorm.{side}" for side in ("input", "output")} | {
        f"lm_head.layer_norm.{side}" for side in ("input", "output")
    } | {"lm_head.dense.input", "lm_head.decoder.input"}

    seen = {}
    static.model.roberta.encoder.layer[1].output.dense.register_forward_hook(
        lambda _, inputs, output: seen.update(input=inputs[0], output=output)
    )
    held_out_loss(static.model, scored)
    for side in ("input", "output"):
        activation = static.ranges[f"{layer}.output.dense.{side}"]
        steps = seen[side] / ((activation.high - activation.low) / 255)
        assert (steps - steps.round()).abs().max() < 1e-2 and len(steps.round().unique()) <= 256
    for module in static.model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            assert len(module.weight.unique()) <= 256
    assert len(model.roberta.encoder.layer[1].output.dense.weight.unique()) > 256  # the original is unchanged


def test_ranges_are_a_running_minimum_and_maximum_of_real_tokens():
    model = model_of("softmax0").eval()
    known = batches(3, seed=3)
    low = high = None
    for batch in known:
        with torch.no_grad():
            hidden = model.roberta.embeddings(batch["input_ids"])[batch["attention_mask"].bool()]
        new = min(hidden.min().item(), 0), max(hidden.max().item(), 0)
        low, high = new if low is None else (0.9 * low + 0.1 * new[0], 0.9 * high + 0.1 * new[1])
    activation = StaticW8A8(model, known).ranges["roberta.embeddings.LayerNorm.output"]
    assert (activation.low, activation.high) == pytest.approx((low, high), rel=1e-5)


def test_attention_weights_and_scores_ignore_padding():
    model = model_of("softmax1").eval()
    narrow = batches(2, seed=3)
    wide = [
        {name: F.pad(t, (0, 9), value=-100 if name == "labels" else 0) for name, t in batch.items()} for batch in narrow
    ]
    ranges, wider = (StaticW8A8(model, known).ranges for known in (narrow, wide))
    for name, range_ in ranges.items():
        assert (wider[name].low, wider[name].high) == pytest.approx((range_.low, range_.high), abs=1e-5), name


def test_static_ranges_do_not_depend_on_the_scored_text(trained):
    """A value outside the calibrated range is clipped."""
    static = StaticW8A8(trained, batches(4, seed=3))
    activation = static.ranges["roberta.encoder.layer.0.output.dense.output"]
    quantized = activation(torch.tensor([1e6, -1e6]))
    step = (activation.high - activation.low) / 255
    assert quantized.tolist() == pytest.approx([activation.high, activation.low], abs=step)


# ------------------------------------------------------------------------------------------------------- other ranges


def mean_squared_error(values, low, high):
    scale = (high - low) / 255
    zero = min(max(round(-low / scale), 0), 255)
    return (torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255) - values).square().mean().item()


@pytest.mark.parametrize("outlier", [0.0, 60.0, -1e4])
def test_ranges_from_histograms_against_the_values_themselves(outlier):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + 0.3
    values[:3] = outlier
    bins = quantization._occupied(quantization._histogram(values))
    assert bins.count.sum() == len(values) and (bins.left < bins.right).all()
    assert (bins.left[1:] >= bins.right[:-1]).all()
    for share in (1e-4, 0.3, 0.9999):
        expected = np.quantile(values.numpy(), share)
        assert quantization._percentile(bins, share) == pytest.approx(expected, rel=0.01)
    low, high = min(values.min().item(), 0), max(values.max().item(), 0)
    by_range = {}
    for shrunk in (1.0, 0.7, 0.3, 0.02):
        ends = np.array([low * shrunk]), np.array([high * shrunk])
        scale = (ends[1] - ends[0]) / 255
        zero = np.rint(-ends[0] / scale)
        error = quantization._rounding_error(bins, scale, -zero, 255 - zero)[0]
        by_range[shrunk] = mean_squared_error(values, low * shrunk, high * shrunk)
        assert error == pytest.approx(by_range[shrunk], rel=0.03), shrunk
    best = mean_squared_error(values, *quantization._mse_range(bins, low, high))
    # No range on a plain grid is better by more than the step of the search.
    grid = [
        mean_squared_error(values, low * 0.75**i or -1e-3, high * 0.75**j)
        for i in range(0, 25, 2)
        for j in range(0, 25, 2)
    ]
    assert best <= 1.05 * min(grid) and best <= 1.001 * by_range[1.0]


def test_weights_by_least_squares_and_as_published():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 20.0
    errors = [(rounding(weight) - weight).square().mean() for rounding in (mse_weight, int8_weight)]
    assert errors[0] < 0.9 * errors[1] and len(mse_weight(weight).unique()) <= 256
    assert mse_weight(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    assert torch.equal(published_weight(weight), int8_weight(weight))
    positive = torch.tensor([255.0, 100.4, 0.6])
    assert published_weight(positive).tolist() == [255, 100, 1]  # unsigned; symmetric around 0 it would be 256, 100, 0


def test_estimators_of_one_calibration(trained):
    static = StaticW8A8(trained, batches(4, seed=3), histograms=True)
    name = "roberta.encoder.layer.1.output.dense.output"
    ranges = {"minmax": (static.ranges[name].low, static.ranges[name].high)}
    weight = trained.roberta.encoder.layer[1].output.dense.weight
    module = static.model.roberta.encoder.layer[1].output.dense
    assert torch.equal(module.weight, int8_weight(weight))
    for estimator in ("percentile", "mse", "minmax"):
        static.choose(estimator)
        ranges.setdefault(estimator, (static.ranges[name].low, static.ranges[name].high))
        expected = mse_weight if estimator == "mse" else int8_weight
        assert torch.equal(module.weight, expected(weight))
    assert (static.ranges[name].low, static.ranges[name].high) == ranges["minmax"]
    assert len(set(ranges.values())) == 3
    values = []
    copied = measured_copy(trained)
    handle = copied.roberta.encoder.layer[1].output.dense.register_forward_hook(lambda _, __, out: values.append(out))
    real = []
    for batch in batches(4, seed=3):
        held_out_loss(copied, [batch])
        real.append(values[-1][batch["attention_mask"].bool()].flatten())
    handle.remove()
    expected = np.quantile(torch.cat(real).numpy(), [1 - quantization.PERCENTILE, quantization.PERCENTILE])
    assert ranges["percentile"] == pytest.approx(tuple(expected), rel=0.03)
    with pytest.raises(ValueError, match="histograms"):
        StaticW8A8(trained, batches(1, seed=3)).choose("mse")


# --------------------------------------------------------------------------------------------- the published setting


def test_what_the_published_setting_quantizes():
    model = model_of("softmax0").eval()
    static = StaticW8A8(model, batches(4, seed=3), published=True)
    layer = "roberta.encoder.layer.1"
    expected = {f"{layer}.attention.self.{what}" for what in ("scores", "weights", "context")}
    expected |= {f"{layer}.attention.self.{name}.output" for name in ("query", "key", "value")}
    expected |= {f"{layer}.{name}.output" for name in ("attention.output.dense", "intermediate", "output.dense")}
    expected |= {
        f"{layer}.{name}.LayerNorm.{side}" for name in ("attention.output", "output") for side in ("input", "output")
    }
    assert {name for name in static.ranges if name.startswith(layer)} == expected
    assert {name for name in static.ranges if ".layer." not in name} == {
        "roberta.embeddings.words_and_types",
        "roberta.embeddings.LayerNorm.input",
        "roberta.embeddings.LayerNorm.output",
    }
    assert static.parts == PARTS[:-1]
    quantized = static.model
    for name, module in quantized.roberta.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)):
            assert torch.equal(module.weight, published_weight(model.roberta.get_submodule(name).weight)), name
    for name, parameter in model.lm_head.named_parameters():
        assert torch.equal(quantized.lm_head.get_parameter(name), parameter), name  # the head is left in float32


def test_the_published_setting_rounds_the_sum_of_embeddings_before_positions_are_added():
    model = model_of("softmax0").eval()
    static = StaticW8A8(model, batches(4, seed=3), published=True)
    seen = {}
    static.model.roberta.embeddings.LayerNorm.register_forward_pre_hook(lambda _, inputs: seen.update(sum=inputs[0]))
    batch = batches(1, seed=2)[0]
    held_out_loss(static.model, [batch])
    embeddings = static.model.roberta.embeddings
    with torch.no_grad():
        words = F.embedding(batch["input_ids"], embeddings.word_embeddings.weight)
        partial = static.ranges["roberta.embeddings.words_and_types"]._round(
            words + embeddings.token_type_embeddings.weight[0]
        )
        positions = embeddings.create_position_ids_from_input_ids(batch["input_ids"], 1)
        whole = partial + F.embedding(positions, embeddings.position_embeddings.weight)
        expected = static.ranges["roberta.embeddings.LayerNorm.input"]._round(whole)
    assert torch.equal(seen["sum"], expected) and len(partial.unique()) <= 256


def test_the_published_setting_estimates_ranges_on_the_quantized_model():
    """A range is computed from rounded weights and inputs, which are rounded with the ranges so far."""
    model = model_of("softmax0").eval()
    known = batches(1, seed=3)  # one batch, so the ranges so far are the final ones
    static = StaticW8A8(model, known, published=True)
    name = "roberta.encoder.layer.1.attention.self.query"
    module = static.model.get_submodule(name)
    seen = {}
    module.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0]))
    held_out_loss(static.model, known)
    real = known[0]["attention_mask"].bool()
    assert len(seen["inputs"].unique()) <= 256  # they were rounded
    range_ = static.ranges[f"{name}.output"]
    with torch.no_grad():
        expected = F.linear(seen["inputs"], module.weight, module.bias)[real]
    assert (range_.low, range_.high) == pytest.approx((expected.min().item(), expected.max().item()), rel=1e-6)
    ours = StaticW8A8(model, known).ranges[f"{name}.output"]
    assert (range_.low, range_.high) != pytest.approx((ours.low, ours.high), rel=1e-5)


def test_texts_are_joined_to_full_sequences():
    assert joined([[0, 1, 2], [0, 3, 2], [0, 4, 2]], 4) == [[0, 1, 2, 0], [3, 2, 0, 4]]
    assert joined([[0, 1, 2], [0, 3, 2]], 128) == [[0, 1, 2, 0, 3, 2]]


# ------------------------------------------------------------------------------------------------------------- damage


def test_dynamic_and_weight_only_quantize_every_linear_layer_and_nothing_else(trained):
    for quantized, levels in ((dynamic_w8a8(trained), 256), (with_rounded_weights(trained, int4_weight), 16)):
        layer = quantized.roberta.encoder.layer[0].intermediate.dense
        assert max(len(row.unique()) for row in layer.weight) <= levels
        embedding = quantized.roberta.embeddings.word_embeddings.weight
        assert torch.equal(embedding, trained.roberta.embeddings.word_embeddings.weight)
        assert not torch.equal(quantized.lm_head.decoder.weight, embedding)
    x = torch.randn(2, 3, 32)
    linear = trained.roberta.encoder.layer[0].intermediate.dense
    expected = F.linear(int8_rows(x), int8_rows(linear.weight), linear.bias)
    torch.testing.assert_close(dynamic_w8a8(trained).roberta.encoder.layer[0].intermediate.dense(x), expected)


def test_damage_is_the_gap_to_float32(trained):
    scored = batches(6, seed=2)
    damage = measure_damage(trained, scored, *known_text())
    schemes = damage["schemes"]
    assert list(schemes) == list(SCHEMES) and list(damage["parts"]) == list(damage["part_floors"]) == PARTS
    assert all(0 < floor < 1 for floor in damage["part_floors"].values())
    loss, count = held_out_loss(trained, scored)
    assert damage["masked_tokens"] == count == sum(damage["masked"]) and schemes["float32"]["gap"] == 0
    assert schemes["float32"]["loss"] == pytest.approx(loss, rel=1e-5)
    for figures in schemes.values():
        assert figures["gap"] == pytest.approx(figures["loss"] - loss, abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    losses = {figures["loss"] for figures in schemes.values()}
    assert len(losses) == len(schemes)  # no two schemes are the same by mistake
    assert abs(schemes["bfloat16"]["gap"]) < 0.1 and abs(schemes["w8a8_dynamic"]["gap"]) < 0.1
    assert next(trained.parameters()).dtype == torch.float32


def test_errors_floors_draws_and_texts_of_the_damage(trained):
    scored = batches(6, seed=2)
    draws, published = known_text()
    damage = measure_damage(trained, scored, draws, published)
    masked = np.array(damage["masked"], dtype=float)
    assert damage["texts"].keys() == damage["schemes"].keys() and len(masked) == 48
    exact = np.array(damage["texts"]["float32"])
    for scheme, figures in damage["schemes"].items():
        sums = np.array(damage["texts"][scheme])
        assert sums.sum() / masked.sum() == pytest.approx(figures["loss"], rel=1e-5), scheme
        assert figures["floor"] == 2 * figures["error"] and all(value == float(f"{value:.6g}") for value in sums)
        if scheme not in ("float32", "w8a8_static"):
            assert figures["error"] == pytest.approx(gap_error(sums - exact, masked), rel=1e-2)
            assert "draws" not in figures
    static = damage["schemes"]["w8a8_static"]
    by_hand = []
    for draw in draws:
        quantized = StaticW8A8(trained, draw).model
        by_hand.append(held_out_loss(quantized, scored)[0] - damage["schemes"]["float32"]["loss"])
    assert static["draws"] == pytest.approx(by_hand, abs=1e-6)
    assert static["gap"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    of_texts = gap_error(np.array(damage["texts"]["w8a8_static"]) - exact, masked)
    of_draws = abs(by_hand[0] - by_hand[1]) / 2  # the standard error of the mean of two
    assert static["error"] == pytest.approx(math.hypot(of_texts, of_draws), rel=0.05)


def test_loss_text_by_text():
    model, scored = model_of("softmax1").eval(), batches(2, seed=2)
    losses = per_text_loss(model, scored)
    assert losses.shape == (16, 2) and losses.dtype == torch.float64
    text = {name: tensor[3:4] for name, tensor in scored[1].items()}
    loss, masked = held_out_loss(model, [text])
    assert losses[11].tolist() == pytest.approx([loss * masked, masked], rel=1e-5)
    loss, masked = held_out_loss(model, scored)
    assert losses.sum(0).tolist() == pytest.approx([loss * masked, masked])


def test_the_error_of_a_gap_is_that_of_a_ratio():
    """Against the spread of the gap over many samples of texts, and by hand for texts of equal length."""
    rng = np.random.default_rng(0)
    masked = rng.integers(1, 12, size=(4000, 200)).astype(float)
    differences = 0.3 * masked + rng.normal(size=masked.shape) * np.sqrt(masked)
    gaps = differences.sum(1) / masked.sum(1)
    errors = [gap_error(*pair) for pair in zip(differences[:50], masked[:50], strict=True)]
    assert np.mean(errors) == pytest.approx(gaps.std(), rel=0.05)
    even = np.full(200, 2.0)
    assert gap_error(differences[0], even) == pytest.approx(differences[0].std(ddof=1) / 2 / math.sqrt(200))
    assert math.isnan(gap_error(np.ones(1), np.ones(1)))


def damage_of(exact, quantized, masked):
    return {"masked": masked, "texts": {"float32": list(exact), "w8a8_static": list(quantized)}}


def test_bootstrap_of_the_difference_of_two_gaps():
    rng = np.random.default_rng(1)
    masked = rng.integers(1, 8, size=400).tolist()
    exact = rng.normal(3, 1, size=(2, 400)) * masked
    hard = rng.normal(size=400)  # the same texts are hard to quantize in both runs
    gaps = [(0.5 + hard) * masked, (0.3 + hard + 0.1 * rng.normal(size=400)) * masked]
    runs = [damage_of(losses, losses + gap, masked) for losses, gap in zip(exact, gaps, strict=True)]
    low, high = bootstrap_difference(*runs, "w8a8_static")
    truth = (gaps[1].sum() - gaps[0].sum()) / sum(masked)
    assert low < truth < high and truth == pytest.approx(-0.2, abs=0.03)
    error = gap_error(gaps[1] - gaps[0], np.array(masked))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)  # paired: the difficulty of the texts cancels
    assert bootstrap_difference(*runs, "w8a8_static") == (low, high)
    assert bootstrap_difference(runs[0], runs[0], "w8a8_static") == (0, 0)
    with pytest.raises(ValueError, match="different texts"):
        bootstrap_difference(runs[0], damage_of(exact[1], exact[1], masked[::-1]), "w8a8_static")
    lost = damage_of(exact[1], [None, *exact[1][1:]], masked)  # NaN is null in analysis.json
    assert all(map(math.isnan, bootstrap_difference(runs[0], lost, "w8a8_static")))


def test_a_model_that_has_diverged_has_damage_without_figures():
    model = model_of("softmax1").eval()
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.bias[0] = math.nan
    schemes = measure_damage(model, batches(2, seed=2), *known_text())["schemes"]
    assert all(math.isnan(figures["loss"]) and math.isnan(figures["gap"]) for figures in schemes.values())


class Tokenizer:
    bos_token_id = cls_token_id = 0
    eos_token_id = sep_token_id = 2

    def decode(self, ids):
        return "vorto"


def test_a_broken_channel_of_an_ffn_output_is_recognised_by_every_instrument(trained):
    """A channel of the FFN output of layer 1 times 100: kurtosis, norm, channel and W8A8 gap show layer 1."""
    scored = batches(6, seed=2)
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in scored]
    places = {"whole": measure_model(trained, texts, Tokenizer())[0]}
    channel = places["whole"]["layer.1.ffn_output"]["largest_channel"]
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        dense = broken.roberta.encoder.layer[1].output.dense
        dense.weight[channel] *= 100
        dense.bias[channel] *= 100
    places["broken"] = measure_model(broken, texts, Tokenizer())[0]

    def by_layer(model, statistic, place="ffn_output"):
        return np.array([places[model][f"layer.{layer}.{place}"][statistic] for layer in range(3)])

    for statistic in (
        "kurtosis_sequence",
        "kurtosis_token",
        "kurtosis_pooled",
        "inf_norm",
        "max_abs",
        "top1_to_median",
    ):
        before, after = by_layer("whole", statistic), by_layer("broken", statistic)
        assert after.argmax() == 1 and after[1] > 3 * max(before[1], 1), statistic
        assert after[0] == pytest.approx(before[0], rel=1e-4), statistic
    assert places["broken"]["layer.1.ffn_output"]["largest_channel"] == channel
    assert places["broken"]["layer.1.ffn_residual"]["largest_channel"] == channel
    assert by_layer("broken", "largest_channel_share")[1] > 0.9

    damage = measure_damage(broken, scored, *known_text())
    parts = damage["parts"]
    assert max(parts, key=parts.get) == "layer.1"
    assert parts["layer.1"] > 5 * max(gap for part, gap in parts.items() if part != "layer.1")
    whole = measure_damage(trained, scored, *known_text())
    assert damage["schemes"]["w8a8_static"]["gap"] > 5 * abs(whole["schemes"]["w8a8_static"]["gap"])


def test_a_model_outside_the_attention_interface_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = DebertaV2ForMaskedLM(DebertaV2Config(**sizes, vocab_size=60))
    with pytest.raises(ValueError, match="attention interface"):
        StaticW8A8(model, [])


# --------------------------------------------------------------------------------- the instrument is blind to the class


def with_loud_head(model):
    """Give a head of layer 1, in place, equal logits of 4,525, so that rounding leaves the other heads no levels."""
    size = model.config.hidden_size // model.config.num_attention_heads
    attention = model.roberta.encoder.layer[1].attention.self
    with torch.no_grad():
        for linear in (attention.query, attention.key):
            linear.weight[:size] = 0
            linear.bias[:size] = (4525 / size**0.5) ** 0.5
    return model


@pytest.fixture(scope="module")
def pair():
    """The same weights in the stock class and in ours, with n = 1e-30 in place of 0."""
    stock = with_loud_head(learn(model_of("softmax0")))
    ours = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**SMALL, softmax_n=1e-30))
    ours.load_state_dict(stock.state_dict())
    return stock, ours.eval()


def test_both_classes_have_the_same_ranges_and_none_is_unset(pair):
    stock, ours = (StaticW8A8(model, batches(4, seed=3)).ranges for model in pair)
    assert stock.keys() == ours.keys()
    for name, range_ in stock.items():
        assert range_.low is not None and ours[name].low is not None, name
        assert (ours[name].low, ours[name].high) == pytest.approx((range_.low, range_.high), rel=1e-6), name


def test_gaps_do_not_depend_on_the_class(pair):
    stock, ours = (measure_damage(model, batches(6, seed=2), *known_text()) for model in pair)
    assert stock["schemes"]["w8a8_static"]["gap"] > 0.002  # the head with large logits does damage
    for scheme, figures in stock["schemes"].items():
        assert ours["schemes"][scheme]["gap"] == pytest.approx(figures["gap"], abs=1e-6), scheme
    assert ours["parts"] == pytest.approx(stock["parts"], abs=1e-6)


@pytest.mark.parametrize(
    "copy_of",
    [dynamic_w8a8, lambda model: with_rounded_weights(model, int4_weight), measured_copy],
    ids=["w8", "w4", ""],
)
def test_losses_are_the_same_bit_by_bit_in_both_classes(pair, copy_of):
    """In bfloat16 too, where another attention kernel would round differently: so both classes run the same one."""
    stock, ours = (copy_of(model) for model in pair)
    assert stock.config._attn_implementation == ours.config._attn_implementation == quantization.ATTENTION
    assert torch.equal(per_text_loss(stock, batches(3, seed=2)), per_text_loss(ours, batches(3, seed=2)))
    stock, ours = (model.to(torch.bfloat16) for model in (stock, ours))
    assert torch.equal(per_text_loss(stock, batches(3, seed=2)), per_text_loss(ours, batches(3, seed=2)))


def test_softmax1_in_the_stock_class_has_the_gaps_of_softmax1_in_ours():
    ours = learn(model_of("softmax1"))
    stock = RobertaForMaskedLM(RobertaConfig(**SMALL))
    stock.load_state_dict(ours.state_dict(), strict=False)  # strict loading refuses weights of softmax1
    without = StaticW8A8(stock, batches(2, seed=3)).ranges
    apply_softmax_n(stock, 1.0)
    first, second = (StaticW8A8(model, batches(2, seed=3)) for model in (ours, stock))
    assert torch.equal(*(per_text_loss(static.model, batches(3, seed=2)) for static in (first, second)))
    name = "roberta.encoder.layer.1.attention.self.weights"
    assert first.ranges[name].high == second.ranges[name].high != without[name].high


def test_a_stock_class_attends_with_softmax_whatever_its_config_says():
    config = RobertaConfig(**SMALL, softmax_n=1.0)  # as save_pretrained writes it after apply_softmax_n
    model = RobertaForMaskedLM(config).eval()
    expected = held_out_loss(model, batches(1, seed=2))[0]
    assert held_out_loss(measured_copy(model), batches(1, seed=2))[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax0", "softmax1"])
def test_an_activation_without_a_range_is_refused(kind, monkeypatch):
    monkeypatch.setattr(StaticW8A8, "_on_input", lambda self, name, module, part: self._range(f"{name}.input", part))
    with pytest.raises(RuntimeError, match=r"roberta.encoder.layer.0.intermediate.dense.input"):
        StaticW8A8(model_of(kind), batches(1, seed=3))


def test_an_attention_that_does_not_run_is_refused(monkeypatch):
    """A class that keeps its own attention, whichever is requested, would not be quantized there."""
    getter = property(lambda self: "softmax_n", RobertaSoftmaxNConfig._attn_implementation.fset)
    monkeypatch.setattr(RobertaSoftmaxNConfig, "_attn_implementation", getter)
    with pytest.raises(RuntimeError, match=r"layer.0.attention.self.scores.*layer.2.attention.self.weights"):
        StaticW8A8(model_of("softmax1"), batches(1, seed=3))


def test_a_quantized_softmax_n_model_still_says_softmax_n_when_it_is_saved(tmp_path):
    static = StaticW8A8(model_of("softmax1"), batches(1, seed=3))
    assert static.model.config._attn_implementation == quantization.ATTENTION
    assert static.model.config.to_dict()["_attn_implementation"] == "softmax_n"
    static.model.save_pretrained(tmp_path)
    assert RobertaSoftmaxNForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "softmax_n"
    model = model_of("softmax1")
    for refused in ("sdpa", "eager", {"": "sdpa"}):
        with pytest.raises(ValueError, match="softmax model"):
            model.set_attn_implementation(refused)
    model.config._attn_implementation = "fake_quantized"
    assert model.config._attn_implementation == "softmax_n"


def test_distinct_values_count_what_is_rounded():
    static = StaticW8A8(model_of("softmax1"), batches(2, seed=3))
    assert all(1 <= count <= 256 for count in static.distinct_values(batches(1, seed=2)).values())
    static.model.roberta.encoder.layer[0].attention.self.quantizers = None
    counts = static.distinct_values(batches(1, seed=2))
    assert counts["roberta.encoder.layer.0.attention.self.scores"] == 0
