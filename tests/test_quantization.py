"""Quantization: its grids by hand, what is and is not quantized, and that a broken layer is recognised."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import quantization
from held_out import held_out_loss
from outliers import measure_model
from quantization import (
    SCHEMES,
    StaticW8A8,
    dynamic_w8a8,
    int4_weight,
    int8_rows,
    int8_weight,
    measure_damage,
    relative_error,
    weight_errors,
    weight_only_w4,
)
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM

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
    "initializer_range": 0.1,  # with 32 channels, activations of the size that large models have
}
PARTS = ["embeddings", "layer.0", "layer.1", "layer.2", "head"]


def batches(count, seed, width=12):
    """Sequences that count upwards from one of three starts, which the unmasked tokens tell; some padding."""
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
    """Two draws to calibrate on, and what the published setting is calibrated on."""
    return [batches(4, seed=3), batches(4, seed=4)], batches(4, seed=5)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SMALL))
    if kind == "softmax1":
        return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**SMALL, softmax_n=1.0))
    return RobertaForMaskedLM(RobertaConfig(**SMALL))


def learn(model, steps=150):
    """Trained in place on the sequences above, and in eval mode."""
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
    """A small model that has learnt its task, so that damage is damage."""
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
    weight[0, 0] = 1000  # ruins its own group of 128 and no other
    rounded = int4_weight(weight)
    assert rounded[0, 1 : quantization.GROUP_SIZE].abs().sum() == 0
    torch.testing.assert_close(rounded[0, quantization.GROUP_SIZE :], weight[0, quantization.GROUP_SIZE :])
    assert int4_weight(torch.randn(3, 50)).shape == (3, 50)  # groups of 50


def test_rounding_errors_of_parameters():
    model = model_of("softmax0")
    errors = weight_errors(model)
    assert errors.keys() == dict(model.named_parameters()).keys()
    weight = model.roberta.encoder.layer[0].output.dense.weight
    found = errors["roberta.encoder.layer.0.output.dense.weight"]
    scale = weight.abs().max() / 127
    by_hand = (weight - (weight / scale).round() * scale).norm() / weight.norm()
    assert found["int8_error"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert found["int4_error"] > 5 * found["int8_error"]
    assert "int4_error" not in errors["roberta.encoder.layer.0.output.dense.bias"]


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
        found = static.ranges[f"{layer}.output.dense.{side}"]
        steps = seen[side] / ((found.high - found.low) / 255)
        assert (steps - steps.round()).abs().max() < 1e-2 and len(steps.round().unique()) <= 256
    for module in static.model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            assert len(module.weight.unique()) <= 256
    assert len(model.roberta.encoder.layer[1].output.dense.weight.unique()) > 256  # the original is left alone


def test_ranges_are_a_running_minimum_and_maximum_of_real_tokens():
    model = model_of("softmax0").eval()
    known = batches(3, seed=3)
    low = high = None
    for batch in known:
        with torch.no_grad():
            hidden = model.roberta.embeddings(batch["input_ids"])[batch["attention_mask"].bool()]
        new = min(hidden.min().item(), 0), max(hidden.max().item(), 0)
        low, high = new if low is None else (0.9 * low + 0.1 * new[0], 0.9 * high + 0.1 * new[1])
    found = StaticW8A8(model, known).ranges["roberta.embeddings.LayerNorm.output"]
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)


def test_attention_weights_and_scores_ignore_padding():
    model = model_of("softmax1").eval()
    narrow = batches(2, seed=3)
    wide = [
        {name: F.pad(t, (0, 9), value=-100 if name == "labels" else 0) for name, t in batch.items()} for batch in narrow
    ]
    one, other = (StaticW8A8(model, known).ranges for known in (narrow, wide))
    for name, found in one.items():
        assert (other[name].low, other[name].high) == pytest.approx((found.low, found.high), abs=1e-5), name


def test_static_ranges_do_not_look_at_the_text_that_is_scored(trained):
    """A token's value past the calibrated range is cut off: that is what static means."""
    static = StaticW8A8(trained, batches(4, seed=3))
    found = static.ranges["roberta.encoder.layer.0.output.dense.output"]
    quantized = found(torch.tensor([1e6, -1e6]))
    step = (found.high - found.low) / 255
    assert quantized.tolist() == pytest.approx([found.high, found.low], abs=step)


# ------------------------------------------------------------------------------------------------------------- damage


def test_dynamic_and_weight_only_quantize_every_linear_layer_and_nothing_else(trained):
    for quantized, levels in ((dynamic_w8a8(trained), 256), (weight_only_w4(trained), 16)):
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
    found = measure_damage(trained, scored, *known_text())
    schemes = found["schemes"]
    assert list(schemes) == list(SCHEMES) and list(found["parts"]) == PARTS
    loss, count = held_out_loss(trained, scored)
    assert found["masked_tokens"] == count == sum(found["masked"]) and schemes["float32"]["gap"] == 0
    assert schemes["float32"]["loss"] == pytest.approx(loss, rel=1e-5)
    for one in schemes.values():
        assert one["gap"] == pytest.approx(one["loss"] - loss, abs=1e-5) and one["perplexity"] == pytest.approx(
            math.exp(one["loss"])
        )
    assert len({one["loss"] for one in schemes.values()}) == len(schemes)  # none is another by mistake
    assert abs(schemes["bfloat16"]["gap"]) < 0.1 and abs(schemes["w8a8_dynamic"]["gap"]) < 0.1
    assert next(trained.parameters()).dtype == torch.float32


class Tokenizer:
    bos_token_id = cls_token_id = 0
    eos_token_id = sep_token_id = 2

    def decode(self, ids):
        return "vorto"


def test_a_broken_channel_of_an_ffn_output_is_recognised_by_every_instrument(trained):
    """One channel of the FFN output of layer 1 times 100: kurtosis, norm, channel and W8A8 gap point at layer 1."""
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


def test_a_model_past_the_attention_interface_is_refused():
    model = model_of("softmax0")
    type(model)._supports_attention_backend, before = False, type(model)._supports_attention_backend
    try:
        with pytest.raises(ValueError, match="attention interface"):
            StaticW8A8(model, [])
    finally:
        type(model)._supports_attention_backend = before


# --------------------------------------------------------------------------------- the instrument is blind to the class


def with_loud_head(model):
    """In place: one head of layer 1 attends evenly, with logits of 4,525, which leave the other heads' scores no levels."""
    size = model.config.hidden_size // model.config.num_attention_heads
    attention = model.roberta.encoder.layer[1].attention.self
    with torch.no_grad():
        for linear in (attention.query, attention.key):
            linear.weight[:size] = 0
            linear.bias[:size] = (4525 / size**0.5) ** 0.5
    return model


@pytest.fixture(scope="module")
def pair():
    """The same weights in the stock class and in ours, n = 1e-30 standing for 0."""
    stock = with_loud_head(learn(model_of("softmax0")))
    ours = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**SMALL, softmax_n=1e-30))
    ours.load_state_dict(stock.state_dict())
    return stock, ours.eval()


def test_both_classes_have_the_same_ranges_and_all_of_them_are_filled(pair):
    stock, ours = (StaticW8A8(model, batches(4, seed=3)).ranges for model in pair)
    assert stock.keys() == ours.keys()
    for name, found in stock.items():
        assert found.low is not None and ours[name].low is not None, name
        assert (ours[name].low, ours[name].high) == pytest.approx((found.low, found.high), rel=1e-6), name


def test_gaps_do_not_depend_on_the_class(pair):
    stock, ours = (measure_damage(model, batches(6, seed=2), *known_text()) for model in pair)
    assert stock["schemes"]["w8a8_static"]["gap"] > 0.002  # the loud head is felt
    for scheme, one in stock["schemes"].items():
        assert ours["schemes"][scheme]["gap"] == pytest.approx(one["gap"], abs=1e-6), scheme
    assert ours["parts"] == pytest.approx(stock["parts"], abs=1e-6)
