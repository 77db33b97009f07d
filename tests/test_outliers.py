"""Every statistic of DEFINITIONS.md against hand-computed cases, scipy and loops over single sequences."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import kurtosis
import outliers
from kurtosis import ActivationKurtosis, Moments
from outliers import (
    FFN_PLACES,
    FIRST,
    OTHER,
    PUNCTUATION,
    SEPARATOR,
    SINK_RATES,
    ActivationOutliers,
    AttentionSinks,
    Emergence,
    eager_attention,
    measure_model,
    token_classes,
)
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM

MODEL = {**SMALL, "vocab_size": 60, "max_position_embeddings": 40}


def random_values(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def batch_of(lengths, width):
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), width), 1)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 60, (length,), generator=generator)
        row[0], row[length - 1] = 0, 2
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def first_and_others(mask):
    """Token classes of texts without separators and punctuation."""
    classes = torch.full(mask.shape, OTHER)
    classes[:, 0] = FIRST
    return classes


def model_with(n):
    torch.manual_seed(0)
    if n:
        model = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**MODEL, softmax_n=n))
    else:
        model = RobertaForMaskedLM(RobertaConfig(**MODEL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


class Tokenizer:
    """Decodes a few ids to punctuation, the others to a word; 0 and 2 are <s> and </s>."""

    bos_token_id = cls_token_id = 0
    eos_token_id = sep_token_id = 2

    def decode(self, ids):
        return {5: ".", 6: " —", 7: "a.", 8: "�", 9: " ", 10: "«?"}.get(ids[0], "vorto")


# ------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_merged_moments_are_those_of_all_numbers_together(shift):
    values = (random_values(60, 7).double() ** 3 + shift).double()
    group = torch.arange(60) % 3
    rows = Moments.of_rows(values)
    merged = rows.merged(group, 4)
    for i in range(3):
        numbers = values[group == i].flatten().numpy()
        n, mean, *sums = merged.sums[i].tolist()
        assert n == len(numbers) and mean == pytest.approx(numbers.mean(), rel=1e-12)
        for k, total in zip((2, 3, 4), sums, strict=True):
            assert total == pytest.approx(((numbers - numbers.mean()) ** k).sum(), rel=1e-7)
        assert merged.excess_kurtosis[i].item() == pytest.approx(scipy.stats.kurtosis(numbers), rel=1e-7)
    assert merged.excess_kurtosis[3].isnan()  # an empty group
    whole = scipy.stats.kurtosis(values.flatten().numpy())
    assert merged.pooled().excess_kurtosis.item() == pytest.approx(whole, rel=1e-7)
    halves = Moments.of_rows(values[:20]).pooled() + Moments.of_rows(values[20:]).pooled()
    assert halves.excess_kurtosis.item() == pytest.approx(whole, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_of_half_precision_and_of_constants(dtype):
    values = (random_values(4, 500) * 300).to(dtype)  # 300^4 is far above float16's largest number
    expected = scipy.stats.kurtosis(values.double().numpy(), axis=1)
    np.testing.assert_allclose(Moments.of_rows(values).excess_kurtosis, expected, atol=1e-4)
    assert Moments.of_rows(torch.full((2, 9), 0.1, dtype=dtype)).excess_kurtosis.isnan().all()


# --------------------------------------------------------------------------------------------------------- activations


def test_every_statistic_by_hand():
    # Two sequences of two tokens with four channels.
    values = torch.tensor([[8.0, 1, -1, 2], [0.5, -0.5, 1, 0], [-6.0, 2, 2, 2], [1.0, 3, 5, 7]])
    statistics = ActivationOutliers(torch.nn.Identity())
    statistics.add("place", values, torch.tensor([0, 0, 1, 1]), torch.tensor([FIRST, OTHER, FIRST, SEPARATOR]))
    (place,) = statistics.result().values()
    numbers = values.numpy()
    assert place["mean"] == pytest.approx(numbers.mean()) and place["std"] == pytest.approx(numbers.std())
    pooled, of_tokens = scipy.stats.kurtosis(numbers.ravel()), scipy.stats.kurtosis(numbers, axis=1)
    of_sequences = [scipy.stats.kurtosis(numbers[:2].ravel()), scipy.stats.kurtosis(numbers[2:].ravel())]
    assert place["kurtosis_pooled"] == pytest.approx(pooled, rel=1e-6)
    assert place["kurtosis_token"] == pytest.approx(of_tokens.mean(), rel=1e-6)
    assert place["kurtosis_sequence"] == pytest.approx(np.mean(of_sequences), rel=1e-6)
    assert place["inf_norm"] == 7.5 and place["max_abs"] == 8  # (8 + 7) / 2
    assert place["outlier_count"] == 3 and place["outlier_share"] == 3 / 16  # 8, -6 (at the bound) and 7
    squares = (numbers**2).sum(0)  # 101.25, 14.25, 31, 57
    assert place["largest_channel"] == 0
    assert place["largest_channel_share"] == pytest.approx(squares[0] / squares.sum())
    # |x| of the first sequence: 0 .5 .5 1 1 1 2 8; of the second: 1 2 2 2 3 5 6 7. The lower of the middle two.
    assert place["top1_to_median"] == pytest.approx((8 / 1 + 7 / 2) / 2)
    assert set(place["classes"]) == {"first", "other", "separator"}
    first = place["classes"]["first"]
    assert first["tokens"] == 2 and first["max_abs"] == 8
    assert first["outlier_count"] == 2 and first["outlier_share"] == 2 / 8
    assert first["kurtosis_token"] == pytest.approx(of_tokens[[0, 2]].mean(), rel=1e-6)
    assert first["kurtosis_pooled"] == pytest.approx(scipy.stats.kurtosis(numbers[[0, 2]].ravel()), rel=1e-6)


def test_the_median_is_of_all_channels():
    values = random_values(9, 200) * torch.linspace(0.1, 3, 200)  # the channels differ in size
    statistics = ActivationOutliers(torch.nn.Identity())
    statistics.add("place", values, torch.tensor([0] * 4 + [1] * 5), torch.zeros(9, dtype=torch.long))
    magnitudes = values.abs().numpy()
    expected = [part.max() / np.sort(part.ravel())[(part.size - 1) // 2] for part in (magnitudes[:4], magnitudes[4:])]
    assert statistics.result()["place"]["top1_to_median"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_massive_activations_by_hand():
    """The largest entries with their tokens, and the counts above the bounds of Sun et al., over two batches."""
    statistics = ActivationOutliers(torch.nn.Identity())
    for first, scale in ((1.0, 1.0), (-1500.0, 0.5)):
        values = torch.full((5, 7), scale)  # two sequences, of three and of two tokens
        values[2, 4] = 300 * first
        values[3, 1] = 50 * first
        ids, positions = torch.tensor([0, 11, 12, 0, 13]), torch.tensor([0, 1, 2, 0, 1])
        statistics.add(
            "place", values, torch.tensor([0, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.long), (ids, positions)
        )
    massive = statistics.result()["place"]["massive"]
    # 300, 50; then -450,000 (900,000 medians) and -75,000 (150,000 medians).
    assert massive["above_100"] == 3 and massive["above_1000_medians"] == 2 and massive["count"] == 2
    assert len(massive["top"]) == outliers.TOP
    keys = ("value", "ratio", "token_id", "position", "channel")
    assert [tuple(entry[key] for key in keys) for entry in massive["top"][:4]] == [
        (-450_000, 900_000, 12, 2, 4),
        (-75_000, 150_000, 0, 0, 1),
        (300, 300, 12, 2, 4),
        (50, 50, 0, 0, 1),
    ]


def test_massive_activations_are_found_in_a_model():
    model = model_with(1)
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.LayerNorm.bias[5] = 4000.0
    batch = batch_of([11, 6], 14)
    batch["input_ids"][0, 3] = 5  # decodes to a full stop
    places, _, _ = measure_model(model, [batch], Tokenizer())
    massive = places["layer.1.ffn_layernorm"]["massive"]
    with torch.no_grad():
        hidden = model.roberta(**batch).last_hidden_state
    expected = sorted(hidden[batch["attention_mask"].bool()].abs()[:, 5].tolist(), reverse=True)
    assert [entry["value"] for entry in massive["top"]] == pytest.approx(expected[: outliers.TOP], rel=1e-4)
    assert {entry["channel"] for entry in massive["top"]} == {5}
    entry = massive["top"][0]
    values = [abs(hidden[row, entry["position"], 5].item()) for row in range(2)]
    row = int(np.argmin(np.abs(np.array(values) - entry["value"])))
    assert entry["token"] == Tokenizer().decode([batch["input_ids"][row, entry["position"]].item()])
    length = [11, 6][row]
    assert entry["ratio"] == pytest.approx(entry["value"] / hidden[row, :length].abs().median().item(), rel=1e-3)
    assert massive["above_100"] == 17 and "massive" not in places["layer.1.query"]


def test_streaming_equals_all_at_once():
    values = random_values(40, 10) ** 3
    sequence, classes = torch.arange(40) // 5, torch.arange(40) % 4
    whole, parts = ActivationOutliers(torch.nn.Identity()), ActivationOutliers(torch.nn.Identity())
    whole.add("place", values, sequence, classes)
    for start, stop in ((0, 15), (15, 20), (20, 40)):
        parts.add("place", values[start:stop], sequence[start:stop], classes[start:stop])
    flat = [
        {**statistics.result()["place"], **statistics.result()["place"].pop("classes")["punctuation"]}
        for statistics in (whole, parts)
    ]
    for figures in flat:
        figures.pop("classes", None)
    assert flat[0] == pytest.approx(flat[1], rel=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_every_place_is_the_tensor_that_its_name_says(n):
    """Every place is recomputed from the weights of the model, one unpadded sequence at a time."""
    model = model_with(n)
    lengths = [11, 6]
    padded = batch_of(lengths, 14)
    with torch.no_grad(), ActivationOutliers(model) as statistics:
        statistics.batch(padded["attention_mask"], first_and_others(padded["attention_mask"]))
        model.base_model(**padded)
    places = statistics.result()
    assert len(places) == 2 + 2 * len(outliers.PLACES)
    layer = model.roberta.encoder.layer[1]
    by_hand = {}
    for row, length in zip(padded["input_ids"], lengths, strict=True):
        with torch.no_grad():
            states = model.roberta(row[None, :length], output_hidden_states=True).hidden_states
            x = states[1]
            q, k, v = (part(x)[0].unflatten(1, (2, 8)).transpose(0, 1) for part in
                       (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value))  # fmt: skip
            exponentials = (q @ k.transpose(1, 2) / 8**0.5).exp()
            weights = exponentials / (n + exponentials.sum(-1, keepdim=True))
            context = (weights @ v).transpose(0, 1).flatten(1)
            attended = layer.attention.output.dense(context)
            between = layer.attention.output.LayerNorm(attended + x[0])
            inner = torch.nn.functional.gelu(layer.intermediate.dense(between))
            outer = layer.output.dense(inner)
            tensors = {
                "query": q.transpose(0, 1),
                "key": k.transpose(0, 1),
                "value": v.transpose(0, 1),
                "context": context,
                "attention_output": attended,
                "attention_residual": attended + x[0],
                "attention_layernorm": between,
                "ffn_intermediate": inner,
                "ffn_output": outer,
                "ffn_residual": outer + between,
                "ffn_layernorm": states[2][0],
            }
            for name, tensor in tensors.items():
                by_hand.setdefault(f"layer.1.{name}", []).append(tensor)
            by_hand.setdefault("embeddings", []).append(states[0][0])
    assert len(by_hand) == 1 + len(outliers.PLACES)
    for name, tensors in by_hand.items():
        kurtosis = np.mean([scipy.stats.kurtosis(values.numpy().ravel()) for values in tensors])
        assert places[name]["kurtosis_sequence"] == pytest.approx(kurtosis, abs=2e-4), name
        norm = np.mean([values.abs().max() for values in tensors])
        assert places[name]["inf_norm"] == pytest.approx(norm, rel=1e-4), name


def test_padding_changes_nothing_and_hooks_are_removed():
    model = model_with(1)
    measured = []
    for width in (11, 30):
        batch = batch_of([11, 6], width)
        places, attention, lengths = measure_model(model, [batch], Tokenizer())
        assert lengths == [11, 6]
        measured.append((places["layer.1.ffn_residual"], attention["layer.1"]))
    (narrow_place, narrow_attention), (wide_place, wide_attention) = measured
    for key in ("kurtosis_sequence", "kurtosis_token", "inf_norm", "top1_to_median"):
        assert wide_place[key] == pytest.approx(narrow_place[key], rel=1e-4)
    for key, values in narrow_attention.items():
        assert wide_attention[key] == pytest.approx(values, abs=1e-5, nan_ok=True), key
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "softmax_n"


def test_logits_of_every_eighth_token_are_measured_for_any_batch_size():
    model = model_with(0)
    batch = batch_of([12, 9, 5], 12)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
    together, apart = (measure_model(model, batches, Tokenizer())[0]["logits"] for batches in ([batch], rows))
    assert together["kurtosis_token"] == pytest.approx(apart["kurtosis_token"], rel=1e-4)
    assert sum(of_class["tokens"] for of_class in together["classes"].values()) == math.ceil(26 / outliers.LOGIT_STRIDE)
    with torch.no_grad():
        logits = model(**batch).logits[batch["attention_mask"].bool()][:: outliers.LOGIT_STRIDE]
    assert together["kurtosis_token"] == pytest.approx(scipy.stats.kurtosis(logits.numpy(), axis=1).mean(), abs=1e-4)


def test_bert_and_models_that_lack_places():
    model = BertForMaskedLM(BertConfig(**MODEL)).eval()
    places, attention, _ = measure_model(model, [batch_of([9, 4], 9)], Tokenizer())
    assert {"embeddings", "logits", "layer.1.query", "layer.1.ffn_residual"} <= places.keys()
    assert attention["layer.0"]["null_mass"] == pytest.approx([0, 0], abs=1e-6)
    del model.bert.encoder.layer[1].output.LayerNorm
    model.bert.encoder.layer[1].output.LayerNorm = torch.nn.Sequential()
    with ActivationOutliers(model, ("ffn_output",), embeddings=False) as statistics:
        batch = batch_of([5], 5)
        statistics.batch(batch["attention_mask"], first_and_others(batch["attention_mask"]))
        model.base_model(**batch)
    assert statistics.result().keys() == {"layer.0.ffn_output", "layer.1.ffn_output"}


def test_token_classes():
    ids = torch.tensor([[0, 7, 5, 9, 2, 0], [5, 6, 10, 8, 20, 2]])
    expected = [
        [FIRST, OTHER, PUNCTUATION, OTHER, SEPARATOR, SEPARATOR],
        [FIRST, PUNCTUATION, PUNCTUATION, OTHER, OTHER, SEPARATOR],
    ]
    assert token_classes(ids, Tokenizer()).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- attention


def test_attention_statistics_by_hand():
    # One sequence of four tokens and one padding token, one head: <s>, a word, a full stop, </s>.
    weights = torch.tensor(
        [
            [0.50, 0.10, 0.10, 0.10, 0.0],  # <s>: 0.2 to nothing
            [0.70, 0.05, 0.05, 0.10, 0.0],  # the word: 0.1 to nothing
            [0.00, 0.00, 1.00, 0.00, 0.0],
            [0.10, 0.10, 0.10, 0.20, 0.0],  # 0.5 to nothing
            [0.00, 0.00, 0.00, 0.00, 0.0],  # padding
        ]
    )[None, None]
    sinks = AttentionSinks(torch.nn.Identity())
    sinks.batch(torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[FIRST, OTHER, PUNCTUATION, SEPARATOR, OTHER]]))
    sinks.add("layer.0", weights)
    (figures,) = sinks.result().values()
    figures = {key: values[0] for key, values in figures.items()}
    assert figures["mass_first"] == pytest.approx((0.5 + 0.7 + 0 + 0.1) / 4)
    assert figures["mass_punctuation"] == pytest.approx((0.1 + 0.05 + 1 + 0.1) / 4)
    assert figures["mass_separator"] == pytest.approx((0.1 + 0.1 + 0 + 0.2) / 4)
    assert figures["mass_self"] == pytest.approx((0.5 + 0.05 + 1 + 0.2) / 4)
    assert figures["null_mass"] == pytest.approx((0.2 + 0.1 + 0 + 0.5) / 4)
    assert figures["idle_mass"] == pytest.approx(0.7 + 0.05 + 0.1 + 0.1)  # of the only ordinary query, the word
    rows = [[0.5, 0.1, 0.1, 0.1, 0.2], [0.7, 0.05, 0.05, 0.1, 0.1], [1], [0.1, 0.1, 0.1, 0.2, 0.5]]
    assert figures["entropy"] == pytest.approx(np.mean([scipy.stats.entropy(row) for row in rows]), rel=1e-6)
    # A short sequence. The mean query gives 1.3 / 4 = 0.325 to the first token and 1.25 / 4 = 0.3125 to the full stop.
    assert figures["sink_rate_first_short"] == 1 and figures["sink_rate_any_short"] == 1
    assert math.isnan(figures["sink_rate_first"]) and math.isnan(figures["sink_rate_any_renormalised"])
    weights[0, 0, 1, 0] = 0.5  # then 1.1 / 4 = 0.275
    sinks.add("layer.0", weights)
    assert sinks.result()["layer.0"]["sink_rate_first_short"] == [0.5]
    assert sinks.result()["layer.0"]["sink_rate_any_short"] == [1.0]


def test_renormalised_sink_rates_by_hand():
    """Small weights can be large shares of a query's attention; a query that attends to nothing is left out."""
    weights = torch.zeros(2, 1, 17, 17)
    weights[0, :, :16, 0] = 0.1
    weights[0, :, :15, 1] = 0.1  # 16 real tokens: a long sequence; its last real query attends to the first only
    weights[1, :, :1, 2] = 0.01  # 4 real tokens, of which the first query alone attends to anything
    mask = torch.arange(17) < torch.tensor([[16], [4]])
    sinks = AttentionSinks(torch.nn.Identity())
    sinks.batch(mask, first_and_others(mask))
    sinks.add("layer.0", weights)
    figures = {key: values[0] for key, values in sinks.result()["layer.0"].items()}
    # Mean weights are 0.1, 0.1 * 15 / 16 and 0.01 / 4; mean shares are (15 * 0.5 + 1) / 16, 15 * 0.5 / 16 and 1 / 1.
    assert [figures[f"sink_rate_{which}{length}"] for which in ("first", "any") for length in ("", "_short")] == [0] * 4
    assert figures["sink_rate_first_renormalised"] == 1 and figures["sink_rate_any_renormalised"] == 1
    assert figures["sink_rate_first_renormalised_short"] == 0 and figures["sink_rate_any_renormalised_short"] == 1
    weights[0, :, :16, 2:10] = 0.1  # then the shares are a tenth, or a ninth
    sinks.add("layer.0", weights)
    assert sinks.result()["layer.0"]["sink_rate_first_renormalised"] == [0.5]
    sinks = AttentionSinks(torch.nn.Identity())
    sinks.batch(mask, first_and_others(mask))
    sinks.add("layer.0", torch.zeros(2, 1, 17, 17))  # no query attends to anything: no sink, and no NaN
    for key in SINK_RATES:  # but the null slot gets all attention
        assert sinks.result()["layer.0"][key] == [float("or_null" in key)]


@pytest.mark.parametrize("n", [0, 0.5, 1])
def test_uniform_attention_is_what_a_model_without_logits_does(n):
    model = model_with(n)
    with torch.no_grad():
        for layer in model.roberta.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    lengths = [20, 16, 15, 4, 3, 2]
    _, attention, counted = measure_model(model, [batch_of(lengths[:3], 20), batch_of(lengths[3:], 5)], Tokenizer())
    assert counted == lengths
    uniform = outliers.uniform_attention(lengths, n)
    assert uniform.pop("sequences") == 2 and uniform.pop("sequences_short") == 4
    assert uniform.keys() == {"null_mass", *SINK_RATES}
    for key, value in uniform.items():
        assert attention["layer.1"][key] == pytest.approx([value] * 2, abs=1e-6), key
    # By construction, sequences of at most three tokens have sinks with n = 0, and of at most two tokens with n = 1.
    assert uniform["sink_rate_first_short"] == {0: 0.5, 0.5: 0.25, 1: 0.25}[n]
    assert uniform["sink_rate_first_renormalised_short"] == 0.5
    assert uniform["null_mass"] == pytest.approx(sum(t * n / (n + t) for t in lengths) / 60)


def test_uniform_attention_with_an_n_for_each_head():
    lengths, heads = [20, 16, 3, 2], [0.0, 1.0, 7.5]
    mean = outliers.uniform_attention(lengths, heads)
    by_head = [outliers.uniform_attention(lengths, n) for n in heads]
    assert mean["sequences"] == mean["sequences_short"] == 2
    for key in ("null_mass", *SINK_RATES):
        assert mean[key] == pytest.approx(np.mean([of_head[key] for of_head in by_head])), key
    assert mean["sink_rate_first_short"] == pytest.approx(0.5) and 0.1 < mean["null_mass"] < 0.2


@pytest.mark.parametrize("n", [0, 1])
def test_vectors_of_heads_by_hand(n):
    """Every statistic is recomputed from the weights of the model, one unpadded sequence and one head at a time."""
    model = model_with(n)
    lengths = [11, 6]
    padded = batch_of(lengths, 14)
    padded["input_ids"][0, 4] = 5
    _, attention, _ = measure_model(model, [padded], Tokenizer())
    figures, layer = attention["layer.1"], model.roberta.encoder.layer[1].attention.self
    classes = token_classes(padded["input_ids"], Tokenizer())
    collected, attending = {}, []
    for row, kind, length in zip(padded["input_ids"], classes, lengths, strict=True):
        with torch.no_grad():
            x = model.roberta(row[None, :length], output_hidden_states=True).hidden_states[1]
        kind = kind[:length].numpy()
        q, k, v = (part(x)[0].detach().double().numpy() for part in (layer.query, layer.key, layer.value))
        context, attends = [], []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            logits = q[:, part] @ k[:, part].T / 8**0.5
            weights = np.exp(logits) / (n + np.exp(logits).sum(1, keepdims=True))
            context.append(weights @ v[:, part])
            attends.append(1 - weights.sum(1) <= 0.5)
            collected.setdefault(("attending_share", head), []).extend(attends[head])
            norms = {"key": np.linalg.norm(k[:, part], axis=1), "value": np.linalg.norm(v[:, part], axis=1)}
            for i, name in enumerate(outliers.TOKEN_CLASSES):
                for which, norm in norms.items():
                    collected.setdefault((f"{which}_norm_{name}", head), []).extend(norm[kind == i])
                contribution = (weights * norms["value"])[:, kind == i].sum(1)
                collected.setdefault((f"contribution_{name}", head), []).extend(contribution)
            collected.setdefault(("logit_range", head), []).extend(np.ptp(logits, axis=1))
            collected.setdefault(("logit_max", head), []).append(np.abs(logits).max())
            collected.setdefault(("context_kurtosis", head), []).append(scipy.stats.kurtosis(context[head].ravel()))
        chosen = np.concatenate([of_head[which] for of_head, which in zip(context, attends, strict=True)])
        attending.append(scipy.stats.kurtosis(chosen.ravel()) if chosen.size else np.nan)
        bound = 0.01 * np.sqrt(np.mean(np.square(context)))
        for head in range(2):
            collected.setdefault(("context_near_zero", head), []).append((np.abs(context[head]) <= bound).mean())
    for (key, head), values in collected.items():
        expected = max(values) if key == "logit_max" else np.mean(values)
        assert figures[key][head] == pytest.approx(expected, rel=1e-4, abs=1e-4), (key, head)
    assert {key for key, _ in collected} == figures.keys() - {
        *("mass_first mass_separator mass_punctuation mass_self null_mass entropy idle_mass".split()),
        *SINK_RATES,
        *outliers.CONTEXTS,
    }
    assert figures["context_kurtosis_attending"] == pytest.approx(np.nanmean(attending), rel=1e-4)


def masses(idle, null):
    """The part of AttentionSinks' result that HeadVectors reads: idle mass and null mass of the heads of one layer."""
    return {"layer.0": {"idle_mass": idle, "null_mass": null}}


def test_context_kurtosis_leaves_out_idle_heads():
    """Heads above the bound are left out of the kurtosis; if no head is left, the kurtosis is NaN."""
    vectors = outliers.HeadVectors(torch.nn.Identity())
    mask = torch.ones(2, 5)
    context = random_values(2, 5, 12) ** 3
    context[..., 4:8] *= 1e-3  # the second of three heads is idle
    others = [random_values(2, 5, 12, seed=i) for i in range(3)]
    for i in range(2):
        vectors.batch(mask[i : i + 1], first_and_others(mask[i : i + 1]))
        rows = [vectors[i : i + 1] for vectors in (*others, context)]
        vectors.add("layer.0", torch.full((1, 3, 5, 5), 0.2), *rows)
    kept = np.concatenate([context[..., :4], context[..., 8:]], -1)
    expected = np.mean([scipy.stats.kurtosis(vectors.ravel()) for vectors in kept])
    result = vectors.result(masses(idle=[0.2, 0.9, 0.5], null=[0.0, 0.0, 0.0]))["layer.0"]
    assert result["context_kurtosis_active"] == pytest.approx(expected, rel=1e-5)
    assert result["context_near_zero"][1] > 0.5 > result["context_near_zero"][0]
    result = vectors.result(masses(idle=[0.6, 0.9, 0.51], null=[0.2, 0.9, 0.5]))["layer.0"]
    assert math.isnan(result["context_kurtosis_active"])
    assert result["context_kurtosis_attending_heads"] == pytest.approx(expected, rel=1e-5)


def test_context_kurtosis_of_the_queries_that_attend():
    """Queries that give the null slot more than half of their attention are left out, and so is padding."""
    vectors = outliers.HeadVectors(torch.nn.Identity())
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    context = random_values(2, 5, 8) ** 3
    others = [random_values(2, 5, 8, seed=i) for i in range(3)]
    weights = torch.full((2, 2, 5, 5), 0.1)  # sums to 0.5, the bound: these queries attend
    context[0, 1:, :4] *= 1e-4
    weights[0, 0, 1:] = 0.09
    weights[1] = torch.where(mask[1] > 0, 0.5 / 3, 0.0)
    vectors.batch(mask, first_and_others(mask))
    vectors.add(
        "layer.0", weights * mask[:, None, None] * torch.tensor([1, 5 / 3])[:, None, None, None], *others, context
    )
    expected = np.mean(
        [
            scipy.stats.kurtosis(np.concatenate([context[0, :1, :4].ravel(), context[0, :, 4:].ravel()])),
            scipy.stats.kurtosis(context[1, :3].ravel()),
        ]
    )
    result = vectors.result(masses(idle=[0.0, 0.0], null=[0.4, 0.5]))["layer.0"]
    assert result["context_kurtosis_attending"] == pytest.approx(expected, rel=1e-5)
    assert result["attending_share"] == [0.5, 1.0]
    nulled = outliers.HeadVectors(torch.nn.Identity())
    nulled.batch(mask, first_and_others(mask))
    nulled.add("layer.0", weights * 0.5, *others, context)
    result = nulled.result(masses(idle=[0.0, 0.0], null=[0.9, 0.9]))["layer.0"]
    assert math.isnan(result["context_kurtosis_attending"]) and math.isnan(result["context_kurtosis_attending_heads"])


def flat(nested):
    """{path: number} of all numbers in nested dictionaries and lists."""
    if isinstance(nested, dict):
        return {f"{key}.{path}": value for key, inner in nested.items() for path, value in flat(inner).items()}
    if isinstance(nested, (list, tuple)):
        return flat(dict(enumerate(nested)))
    return {"": nested} if isinstance(nested, (int, float)) else {}


def test_the_class_of_the_model_makes_no_difference():
    """The same weights in the stock class and in ours, where n = 1e-30 stands for 0."""
    stock = model_with(0)
    ours = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**MODEL, softmax_n=1e-30)).eval()
    ours.load_state_dict(stock.state_dict())
    batches = [batch_of([20, 17, 9], 20), batch_of([4, 3], 4)]
    figures = []
    for model in (stock, ours):
        uniform = outliers.uniform_attention([20, 17, 9, 4, 3], model.config.softmax_n if model is ours else 0)
        figures.append(
            flat([measure_model(model, batches, Tokenizer()), uniform, Emergence(batches, Tokenizer())(model)])
        )
    assert figures[0].keys() == figures[1].keys() and len(figures[0]) > 500
    assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("n", [0, 0.5, 1, "learned"])
def test_null_mass_is_n_over_the_denominator(n):
    model = model_with(n)
    if n == "learned":
        n = torch.tensor([[3.0], [0.2]])
        model.roberta.encoder.layer[0].attention.self.log_n.data = n.log().flatten()
    batch = batch_of([9], 9)
    _, attention, _ = measure_model(model, [batch], Tokenizer())
    self = model.roberta.encoder.layer[0].attention.self
    with torch.no_grad():
        x = model.roberta.embeddings(batch["input_ids"])[0]
        q, k = (part(x).unflatten(1, (2, 8)).transpose(0, 1) for part in (self.query, self.key))
        total = (q @ k.transpose(1, 2) / 8**0.5).exp().sum(-1)
    expected = (n / (n + total)).mean(1).tolist()
    assert attention["layer.0"]["null_mass"] == pytest.approx(expected, abs=1e-5)


def test_attention_that_returns_no_weights_is_refused():
    model = model_with(0)
    with AttentionSinks(model) as sinks, pytest.raises(ValueError, match="use eager_attention"):
        sinks.batch(torch.ones(1, 5), first_and_others(torch.ones(1, 5)))
        model.base_model(**batch_of([5], 5))


@pytest.mark.parametrize("n", [0, 1])
def test_eager_attention_changes_no_output_and_is_undone(n):
    model = model_with(n)
    batch = batch_of([9, 4], 9)
    before = model.config._attn_implementation
    with torch.no_grad():
        fast = model(**batch).logits
        with eager_attention(model):
            assert "eager" in model.config._attn_implementation
            slow = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(fast[real], slow[real], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before


# ----------------------------------------------------------------------------------------------------------- emergence


@pytest.mark.parametrize("n", [0, 1])
def test_emergence_gives_the_same_as_the_analysis_and_leaves_the_model_alone(n):
    model = model_with(n).train()
    batches = [batch_of([9, 4], 9), batch_of([20, 11], 20)]
    random_state = torch.get_rng_state()
    emerged = Emergence(batches, Tokenizer())(model)
    assert torch.equal(random_state, torch.get_rng_state()) and model.training
    assert not any(module._forward_hooks for module in model.modules())
    places, attention, _ = measure_model(model, batches, Tokenizer())
    assert len(emerged) == 2 * (3 * 3 + len(Emergence.ATTENTION)) and all(
        isinstance(value, float) for value in emerged.values()
    )
    for place in FFN_PLACES:
        for statistic in Emergence.STATISTICS:
            expected = places[f"layer.1.{place}"][statistic]
            assert emerged[f"layer.1.{place}.{statistic}"] == pytest.approx(expected, rel=1e-5)
    for statistic in Emergence.ATTENTION:
        assert emerged[f"layer.0.attention.{statistic}"] == pytest.approx(np.mean(attention["layer.0"][statistic]))
    assert emerged["layer.0.attention.mass_first"] > 0.05


class AcceleratorWithoutFloat64(TorchDispatchMode):
    """Treats every tensor as one on a device without float64, except copies made by `to_cpu` and results of these."""

    def __init__(self):
        super().__init__()
        self.on_cpu = {}  # storages by address; they are kept, so that no other tensor gets the same address

    def to_cpu(self, values):
        moved = values.clone()
        self.hold(moved)
        return moved

    def hold(self, tensor):
        self.on_cpu[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = [tensor for tensor in tree_leaves((arguments, keywords)) if isinstance(tensor, torch.Tensor)]
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        if all(tensor.untyped_storage().data_ptr() in self.on_cpu for tensor in given) or "lift_fresh" in str(function):
            for tensor in made:
                self.hold(tensor)
        elif any(tensor.dtype == torch.float64 for tensor in made):
            raise TypeError(f"{function} needs float64")
        return result


def test_no_statistic_needs_float64_where_the_model_lies(monkeypatch):
    model, batches = model_with(1.0), [batch_of([9, 4], 9), batch_of([20], 20)]
    values = random_values(6, 5)

    def all_figures():
        with ActivationKurtosis(model) as published, torch.no_grad():
            for batch in batches:
                model(**batch)
        pooled = Moments.of_rows(values).pooled().excess_kurtosis.tolist()
        return repr((measure_model(model, batches, Tokenizer()), published.result(), pooled))

    expected = all_figures()
    with AcceleratorWithoutFloat64() as device:
        for module in (kurtosis, outliers):
            monkeypatch.setattr(module, "with_float64", device.to_cpu)
        assert all_figures() == expected
        for module in (kurtosis, outliers):
            monkeypatch.setattr(module, "with_float64", lambda tensor: tensor)
        with pytest.raises(TypeError, match="needs float64"):
            all_figures()


def test_every_statistic_is_defined():
    """Every key that is written to analysis.json has a row in DEFINITIONS.md."""
    places, attention, _ = measure_model(model_with(1), [batch_of([9, 4], 9)], Tokenizer())
    text = (Path(outliers.__file__).parent / "DEFINITIONS.md").read_text(encoding="utf-8")
    rows = {name for line in text.splitlines() if line.startswith("|") for name in re.findall(r"`([\w.<>]+)`", line)}
    keys = set(attention["layer.0"]) | set(places["layer.0.query"]) | set(places["layer.0.query"]["classes"]["other"])
    keys |= set(places["layer.0.ffn_output"]["massive"]) | set(places["layer.0.ffn_output"]["massive"]["top"][0])
    keys |= set(places["layer.0.ffn_output"]) | set(outliers.uniform_attention([5], 1))
    keys |= set(outliers.PLACES) | set(outliers.EMBEDDINGS) | {outliers.LOGITS} | set(outliers.TOKEN_CLASSES)
    assert keys - rows == set()
