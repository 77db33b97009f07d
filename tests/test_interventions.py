"""Interventions give the same figures as the same changes made by hand, whatever the class of the model."""

import numpy as np
import pytest
import torch
from test_outliers import MODEL, Tokenizer, batch_of, model_with
from transformers import BertConfig, BertForMaskedLM

import interventions as module
from interventions import INTERVENTIONS, interventions
from outliers import measure_model
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM

KEYS = {"loss", "ffn_output_kurtosis", "residual_inf_norm", "sink_rate_first", "null_mass", "heads"}


def masked_batches():
    batches = [batch_of([20, 17, 9], 20), batch_of([18, 18], 18)]
    for batch in batches:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, 1:8:3] = batch["input_ids"][:, 1:8:3]
        batch["input_ids"][:, 1:8:3] = 4
    return batches


def sinking(n):
    """A model with one head, in its second layer, whose attention goes to <s>, or to the null slot if it has one."""
    model = model_with(n)
    attention = model.roberta.encoder.layer[1].attention.self
    with torch.no_grad():
        attention.key.weight.mul_(0.1)
        for layer in model.roberta.encoder.layer:
            layer.attention.self.query.weight.mul_(0.1)
            layer.attention.self.query.bias.mul_(0.1)
        attention.query.weight[:8] = 0
        attention.query.bias[:8] = 0
        attention.query.bias[0] = 60.0
        if n:  # every logit is far below 0: the null slot gets all attention
            attention.key.bias[0] = -5.0
        else:  # the logit of a key grows with its similarity to <s>
            with torch.no_grad():
                states = model.roberta(**{k: v for k, v in masked_batches()[0].items() if k != "labels"},
                                       output_hidden_states=True).hidden_states[1]  # fmt: skip
            direction = states[:, 0].mean(0) - states[:, 1:8].mean((0, 1))
            attention.key.weight[0] = direction / direction.norm()
    return model


def hooks_of(model):
    return [(*part._forward_hooks, *part._forward_pre_hooks) for part in model.modules()]


def loss_by_hand(model, batches, start=0):
    total = count = 0
    for batch in batches:
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            length = int(mask.sum())
            with torch.no_grad():
                logits = model(ids[None, start:length]).logits[0].double()
            labels = labels[start:length]
            chosen = labels != -100
            total += torch.nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum").item()
            count += int(chosen.sum())
    return total / count


@pytest.mark.parametrize("n", [0, 1])
def test_every_intervention_against_the_same_change_by_hand(n):
    model, batches = sinking(n), masked_batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, hooks = model.config._attn_implementation, hooks_of(model)
    results = interventions(model, batches, Tokenizer())
    assert list(results) == list(INTERVENTIONS) and all(figures.keys() == KEYS for figures in results.values())
    assert model.config._attn_implementation == attention
    assert hooks_of(model) == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    assert results["as_trained"]["loss"] == pytest.approx(loss_by_hand(model, batches), rel=1e-5)
    assert results["without_first_token"]["loss"] == pytest.approx(loss_by_hand(model, batches, start=1), rel=1e-5)
    places, heads, _ = measure_model(
        model, [{k: v for k, v in batch.items() if k != "labels"} for batch in batches], Tokenizer()
    )
    kurtosis = [places[f"layer.{i}.ffn_output"]["kurtosis_sequence"] for i in range(2)]
    assert results["as_trained"]["ffn_output_kurtosis"] == pytest.approx(np.mean(kurtosis), rel=1e-5)
    norms = [places[f"layer.{i}.ffn_residual"]["inf_norm"] for i in range(2)]
    assert results["as_trained"]["residual_inf_norm"] == pytest.approx(max(norms), rel=1e-5)
    for key in ("sink_rate_first", "null_mass"):
        expected = np.mean([heads[f"layer.{i}"][key] for i in range(2)])
        assert results["as_trained"][key] == pytest.approx(expected, abs=1e-6)

    # The only sink head is removed by hand: its columns of the next linear layer are set to zero.
    assert [heads[f"layer.{i}"]["sink_rate_any_or_null"] for i in range(2)] == [[0, 0], [1, 0]]
    assert results["without_sink_heads"]["heads"] == results["without_random_heads"]["heads"] == 1
    with torch.no_grad():
        model.roberta.encoder.layer[1].attention.output.dense.weight[:, :8] = 0
    assert results["without_sink_heads"]["loss"] == pytest.approx(loss_by_hand(model, batches), rel=1e-5)
    assert results["without_sink_heads"]["loss"] != results["without_random_heads"]["loss"]


@pytest.mark.parametrize("n", [0, 1])
def test_the_null_slot_is_added_and_removed(n):
    """With the trained n, all figures are as trained; with the other n, they are those of the other class."""
    model, batches = model_with(n), masked_batches()
    results = interventions(model, batches, Tokenizer())
    back = module._measure(module.apply_softmax_n(module.copy.deepcopy(model), n), batches, Tokenizer())[0]
    assert {"heads": 0, **back} == results[f"as_softmax{n}"] == pytest.approx(results["as_trained"], rel=1e-5, abs=1e-7)
    if n:
        assert results["as_softmax1"] == results["as_trained"]
    other = model_with(1 - n)
    other.load_state_dict(model.state_dict(), strict=False)  # weights of another function are refused if strict
    expected = interventions(other, batches, Tokenizer())["as_trained"]
    assert results[f"as_softmax{1 - n}"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert results["as_softmax0"]["null_mass"] < 1e-6 < 0.001 < results["as_softmax1"]["null_mass"]


@pytest.mark.parametrize("build", [model_with, sinking])
def test_the_class_of_the_model_makes_no_difference(build):
    stock = build(0)
    ours = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**MODEL, softmax_n=1e-30)).eval()
    ours.load_state_dict(stock.state_dict())
    results = [interventions(model, masked_batches(), Tokenizer()) for model in (stock, ours)]
    assert results[0].keys() == results[1].keys()
    for name, figures in results[0].items():
        assert figures == pytest.approx(results[1][name], rel=1e-4, abs=1e-5), name


def test_as_many_other_heads_are_drawn_or_none(monkeypatch):
    """There are three draws of as many heads that are not sinks, and no draw if too few such heads are left."""
    model = model_with(0)
    drawn = []
    monkeypatch.setattr(module, "_without", lambda _, heads, *rest: drawn.append(heads) or {"loss": float(len(drawn))})

    def attention(rates):
        layers = {f"layer.{i}": {"sink_rate_any_or_null": heads, "null_mass": heads} for i, heads in enumerate(rates)}
        monkeypatch.setattr(module, "_measure", lambda *rest: ({}, layers))
        return interventions(model, masked_batches(), Tokenizer())

    results = attention([[0.31, 0.3], [0.0, 1.0]])  # a sink rate has to be above 0.3; 0.3 itself is not
    assert drawn[0] == {("layer.0", 0), ("layer.1", 1)} and len(drawn) == 4
    assert all(heads == {("layer.0", 1), ("layer.1", 0)} for heads in drawn[1:])
    assert results["without_random_heads"]["loss"] == 3  # the mean of draws 2 to 4
    assert "without_random_heads" not in attention([[1.0, 1.0], [0.0, 1.0]])
    results = attention([[0.0, 0.1], [float("nan")] * 2])  # NaN: no text is long enough
    assert "without_sink_heads" not in results and "without_random_heads" not in results


def test_no_token_is_removed_where_texts_start_with_different_tokens():
    model, batches = model_with(0), masked_batches()
    batches[0]["input_ids"][1, 0] = 30
    assert "without_first_token" not in interventions(model, batches, Tokenizer())


def test_bert():
    model = BertForMaskedLM(BertConfig(**MODEL)).eval()
    results = interventions(model, masked_batches(), Tokenizer())
    assert results["as_softmax0"] == pytest.approx(results["as_trained"], rel=1e-5, abs=1e-6)
