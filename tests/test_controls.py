"""Controls: known damage is recognised, a broken instrument fails the self-check, published remedies are measured."""

import math

import pytest
import torch
from test_quantization import SMALL, Tokenizer, batches, learn, model_of
from transformers import (
    AutoModelForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

import controls
import interventions
import quantization
from controls import CHECKS, build_control, compensated_outlier, other_class, self_check
from held_out import held_out_loss
from outliers import measure_model, uniform_attention
from packing import keep_masked_positions, pack
from quantization import StaticW8A8
from report import self_check_notes, self_check_table
from runs import Run
from softmax1 import RobertaSoftmaxNForMaskedLM, apply_softmax_n


@pytest.fixture(scope="module", params=["softmax0", "softmax1"])
def trained(request):
    return learn(model_of(request.param))


def checked(model):
    return self_check(model, batches(6, seed=2), batches(4, seed=3))


# ---------------------------------------------------------------------------------------------------------- self-check


def test_a_compensated_outlier_changes_one_tensor_and_not_the_function(trained):
    control = compensated_outlier(trained, 1, 5, 1000.0)
    seen = {}
    for name, model in (("before", trained), ("after", control)):
        for layer in range(3):
            model.roberta.encoder.layer[layer].output.dense.register_forward_hook(
                lambda _, __, out, key=(name, layer): seen.update({key: out.detach()})
            )
    losses = [held_out_loss(model, batches(2, seed=2))[0] for model in (trained, control)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for layer in range(3):
        change = (seen["after", layer] - seen["before", layer])[:, 3]  # a real token
        expected = torch.zeros(32)
        expected[5] = 1000.0 if layer == 1 else 0.0
        torch.testing.assert_close(change, expected.expand_as(change), atol=1e-3, rtol=0)


def test_self_check_passes_on_models_of_both_classes(trained):
    checks = checked(trained)
    assert checks["passed"] is True and all(checks[key]["passed"] is True for key in CHECKS)
    by_layer = checks["large_outlier"]["layers"]
    assert list(by_layer) == ["layer.0", "layer.1", "layer.2"]
    for name, of_layer in by_layer.items():
        assert of_layer["largest_part"] == name and of_layer["gap"] > 1 and abs(of_layer["float32_change"]) < 1e-5
    assert checks["small_outlier"]["gap"] < 0.05 and checks["context"] > 1
    assert checks["class_swap"]["swapped_gap"] == checks["class_swap"]["gap"]
    run = Run("esperberto-softmax1", "", None, damage={"self_check": checks})
    assert "pass: gap" in self_check_table([run]) and self_check_notes([run]) == []


def test_self_check_is_undecided_for_an_untrained_model():
    checks = checked(model_of("softmax1").eval())
    assert checks["passed"] is None and checks["large_outlier"]["passed"] is None
    assert checks["rounding"]["passed"] is True and checks["class_swap"]["passed"] is True
    diverged = model_of("softmax0").eval()
    with torch.no_grad():
        diverged.roberta.encoder.layer[0].output.dense.bias[0] = math.nan
    assert checked(diverged)["large_outlier"]["passed"] is None


def test_a_pre_layernorm_model_gets_the_checks_that_apply_to_it():
    """It has no LayerNorm after the attention that could compensate an outlier, and no place of the residual stream."""
    torch.manual_seed(0)
    model = RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**SMALL)).eval()
    checks = checked(model)
    assert checks["passed"] is None and checks["rounding"]["passed"] is True
    assert checks["large_outlier"] == {"passed": None, "said": "not a post-LayerNorm model"}
    results = interventions.interventions(model, batches(2, seed=2), Tokenizer())
    assert math.isnan(results["as_trained"]["residual_inf_norm"]) and results["as_trained"]["loss"] > 0


def test_the_other_class_computes_the_same_function(trained):
    other = other_class(trained)
    assert type(other) is not type(trained)
    assert held_out_loss(other, batches(1, seed=2))[0] == pytest.approx(
        held_out_loss(trained, batches(1, seed=2))[0], rel=1e-5
    )
    assert other_class(model_of("bert")) is None


def test_the_other_class_has_the_same_learned_sinks():
    model = model_of("learned")
    other = other_class(model)
    assert type(other).__name__ == "SoftmaxNRobertaForMaskedLM"
    ours, theirs = (held_out_loss(of_class, batches(1, seed=2))[0] for of_class in (model, other))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(held_out_loss(apply_softmax_n(model, 1.0), batches(1, seed=2))[0] - ours) > 1e-4


def no_scores(monkeypatch):
    """The quantizers of the attention do not round."""
    attach = StaticW8A8._attach

    def broken(self):
        attach(self)
        for module in self.model.modules():
            if hasattr(module, "quantizers"):
                for activation in module.quantizers:
                    activation.low, activation.high, activation.reset = 0.0, 0.0, lambda: None
                module.quantizers = None

    monkeypatch.setattr(StaticW8A8, "_attach", broken)


def unset_range(monkeypatch):
    observe = quantization._Range._observe
    monkeypatch.setattr(
        quantization._Range,
        "_observe",
        lambda self, *seen: None if self.name.endswith("layer.1.output.dense.output") else observe(self, *seen),
    )


def blind_to_outliers(monkeypatch):
    """Activations are not rounded, so outliers cost nothing."""
    monkeypatch.setattr(quantization._Range, "_round", lambda self, values: values)


def class_matters(monkeypatch):
    """The two classes get different ranges."""
    calibrate = StaticW8A8.calibrate

    def broken(self, *args):
        calibrate(self, *args)
        if not isinstance(self.model, RobertaSoftmaxNForMaskedLM):
            for activation in self.ranges.values():
                activation.low, activation.high = 40 * activation.low, 40 * activation.high

    monkeypatch.setattr(StaticW8A8, "calibrate", broken)


@pytest.mark.parametrize(
    ("breakage", "failing"),
    [
        (no_scores, "rounding"),
        (unset_range, "rounding"),
        (blind_to_outliers, "large_outlier"),
        (class_matters, "class_swap"),
    ],
)
def test_self_check_fails_when_the_instrument_is_broken(trained, breakage, failing, monkeypatch):
    breakage(monkeypatch)
    checks = checked(trained)
    assert checks["passed"] is False and checks[failing]["passed"] is False
    run = Run("esperberto-softmax1", "", None, damage={"self_check": checks})
    (note,) = self_check_notes([run])
    assert "THE INSTRUMENT FAILED" in note and CHECKS[failing] in note and "FAIL" in self_check_table([run])


# ------------------------------------------------------------------------------------------------ published remedies


@pytest.fixture(scope="module", params=["clipped", "gated"])
def control(request):
    torch.manual_seed(0)
    return learn(build_control(request.param, SMALL))


def test_a_control_keeps_its_function_through_saving_and_no_stock_class_loads_it(control, tmp_path):
    control.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is type(control)
    scored = batches(2, seed=2)
    assert held_out_loss(loaded, scored)[0] == held_out_loss(control, scored)[0]
    with pytest.raises((KeyError, ValueError), match="control of this experiment"):
        RobertaForMaskedLM.from_pretrained(tmp_path)


def test_a_control_is_not_softmax_and_takes_packed_batches(control):
    (batch,) = batches(1, seed=2)
    stock = RobertaForMaskedLM(RobertaConfig(**SMALL)).eval()
    stock.load_state_dict(control.state_dict(), strict=False)
    assert held_out_loss(stock, [batch])[0] != pytest.approx(held_out_loss(control, [batch])[0], rel=1e-3)
    prepared = keep_masked_positions(apply_softmax_n(control, 0.0))  # as training does with every model
    with torch.no_grad():
        padded = prepared(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        padded = padded[batch["labels"] != -100]
        for bucket in (1, 32):
            packed = pack(batch, bucket)
            real = packed.pop("labels")[0] != -100
            packed.pop("sequences")
            torch.testing.assert_close(prepared(**packed).logits[0][real], padded, atol=1e-4, rtol=1e-4)


def test_weights_of_clipped_softmax_and_gates_by_hand():
    config = controls.ClippedSoftmaxConfig(**SMALL, clip_gamma=-0.1, clip_zeta=1.2)
    weights = config.attention_weights(torch.tensor([0.0, 0.0, 3.0, -math.inf]))
    p = math.exp(3) / (2 + math.exp(3))
    expected = [max(0.0, 1.3 * (1 - p) / 2 - 0.1)] * 2 + [min(1.0, 1.3 * p - 0.1), 0.0]
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    model = build_control("gated", SMALL).eval()
    seen = {}
    attention = model.roberta.encoder.layer[0].attention
    attention.output.dense.register_forward_pre_hook(lambda _, inputs: seen.update(context=inputs[0]))
    (batch,) = batches(1, seed=2)
    with torch.no_grad():
        held_out_loss(model, [batch])
        half = seen["context"]
        attention.self.gate.weight.zero_()
        held_out_loss(model, [batch])
        even = seen["context"]
        attention.self.gate.bias[1] = -100.0
        held_out_loss(model, [batch])
    assert not torch.equal(half, even)
    heads, closed = (x.unflatten(-1, (4, 8)) for x in (even, seen["context"]))
    assert closed[:, :, 1].abs().max() == 0 and torch.equal(closed[:, :, [0, 2, 3]], heads[:, :, [0, 2, 3]])


def test_the_published_remedies_can_be_measured(control):
    scored = batches(3, seed=2)
    expected = held_out_loss(control, scored)[0]
    static = StaticW8A8(control, batches(3, seed=3))
    with static.only("nothing") as exact:
        assert held_out_loss(exact, scored)[0] == pytest.approx(expected, rel=1e-4)
    assert all(1 <= count <= 256 for count in static.distinct_values(scored).values())
    gated = control.config.model_type == "roberta-gated-attention"
    assert ("roberta.encoder.layer.0.attention.self.gate.input" in static.ranges) == gated
    published = StaticW8A8(control, batches(3, seed=3), published=True)
    assert not any("gate" in name for name in published.ranges)  # as in the published code
    checks = checked(control)
    assert checks["passed"] is True and checks["class_swap"]["passed"] is None
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in scored]
    places, attention, _ = measure_model(control, texts, Tokenizer())
    null = [mass for layer in attention.values() for mass in layer["null_mass"]]
    assert max(null) < 1e-5 if gated else max(null) > 1e-3  # clipped weights need not sum to 1
    assert places["layer.0.context"]["max_abs"] > 0


def test_clipped_softmax_has_no_as_softmax_intervention_and_its_own_uniform_attention():
    """Uniform weights are clip(1.025 / T - 0.025, 0, 1): zero from 41 tokens on."""
    clipped = build_control("clipped", SMALL).eval()
    results = interventions.interventions(clipped, batches(2, seed=2), Tokenizer())
    assert not {"as_softmax0", "as_softmax1"} & results.keys() and "as_trained" in results
    gated = interventions.interventions(build_control("gated", SMALL).eval(), batches(2, seed=2), Tokenizer())
    assert {"as_softmax0", "as_softmax1"} <= gated.keys()
    weights = clipped.config.attention_weights
    for length in (2, 16, 41, 60):
        weight = max(1.025 / length - 0.025, 0)
        uniform = uniform_attention([length], 0.0, weights)
        assert uniform["null_mass"] == pytest.approx(1 - length * weight, abs=1e-12)
        key = "sink_rate_first" if length >= 16 else "sink_rate_first_short"
        assert uniform[key] == float(weight > 0.3)


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="clipped, gated"):
        build_control("other", SMALL)
