"""The kurtosis that everything else measures with: closed forms, scipy, and hooks done by hand."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from outliers import ActivationKurtosis, excess_kurtosis, sequence_excess_kurtosis, weight_excess_kurtosis

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


def small_roberta():
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**SMALL)).eval()


def batch_of(lengths, width):
    """input_ids and attention_mask of sequences of these lengths, padded to `width`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), width), 1)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 60, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def watched(model, batch, mask=None):
    with torch.no_grad(), ActivationKurtosis(model) as kurtosis:
        kurtosis.mask = mask
        model(**batch)
    return kurtosis.result()


def test_closed_forms():
    generator = torch.Generator().manual_seed(0)
    n = 1_000_000
    # Standard errors of the sample kurtosis: sqrt(24 / n) = 0.005 for a Gaussian, 0.0015 for a uniform distribution.
    assert abs(excess_kurtosis(torch.randn(n, generator=generator))) < 0.025
    assert abs(excess_kurtosis(torch.rand(n, generator=generator)) + 1.2) < 0.008
    assert excess_kurtosis(torch.tensor([1.0, -1.0]).repeat(500)) == -2
    # One value in k differs: p(1 - p) two-point law, excess kurtosis 1 / (p (1 - p)) - 6.
    assert excess_kurtosis(torch.tensor([1.0] + [0.0] * 99)).item() == pytest.approx(1 / 0.0099 - 6)


def test_agrees_with_scipy_at_a_large_mean():
    values = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(2)).double().pow(3) + 1000
    ours = sequence_excess_kurtosis(values)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, scipy.stats.kurtosis(values.flatten(1).numpy(), axis=1), rtol=1e-9)


def test_float32_error_is_rounding_only():
    values = torch.randn(4, 64, 768, generator=torch.Generator().manual_seed(3)) + 3
    expected = scipy.stats.kurtosis(values.double().flatten(1).numpy(), axis=1)
    np.testing.assert_allclose(sequence_excess_kurtosis(values), expected, atol=1e-4)


def test_masked_sequences_agree_with_scipy_on_the_real_tokens():
    values = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(4)).double() + 2
    lengths = [9, 4, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = [scipy.stats.kurtosis(row[:length].numpy().ravel()) for row, length in zip(values, lengths, strict=True)]
    for kind in (mask, mask.long()):
        np.testing.assert_allclose(sequence_excess_kurtosis(values, kind), expected, rtol=1e-12)
    values[~mask] = 1e6  # whatever stands in the padding
    np.testing.assert_allclose(sequence_excess_kurtosis(values, mask), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1000.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_have_no_kurtosis(value, dtype):
    constant = torch.full((2, 37, 16), value, dtype=dtype)
    assert excess_kurtosis(constant).isnan()
    assert sequence_excess_kurtosis(constant).isnan().all()
    assert sequence_excess_kurtosis(constant, torch.ones(2, 37)).isnan().all()


def test_a_sequence_without_real_tokens_has_no_kurtosis():
    values = torch.randn(2, 3, 4)
    result = sequence_excess_kurtosis(values, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert result.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    # 300^4 = 8e9 is far above float16's 65504.
    values = (torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(5)) * 300).to(dtype)
    expected = scipy.stats.kurtosis(values.double().flatten(1).numpy(), axis=1)
    for mask in (None, torch.ones(2, 50)):
        result = sequence_excess_kurtosis(values, mask)
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result, expected, atol=1e-4)


def test_weights_are_all_entries_of_every_parameter():
    model = small_roberta()
    result = weight_excess_kurtosis(model)
    assert result.keys() == {name for name, _ in model.named_parameters()}
    weight = model.roberta.encoder.layer[1].attention.output.dense.weight
    expected = scipy.stats.kurtosis(weight.detach().double().numpy().ravel())
    assert result["roberta.encoder.layer.1.attention.output.dense.weight"] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(result["roberta.encoder.layer.0.attention.output.LayerNorm.weight"])  # all ones at the start


@pytest.mark.parametrize("masked", [False, True])
def test_hooks_equal_hooks_by_hand(masked):
    model = small_roberta()
    batches = [batch_of([12, 5], 12), batch_of([7, 7, 3], 9)]
    names = ["roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.1.output", "lm_head.decoder"]
    by_hand = {name: [] for name in names}
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        for name in names
    ]
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        for name in names:
            for out, real in zip(outputs[name], batch["attention_mask"].bool(), strict=True):
                kept = out[real] if masked else out
                by_hand[name].append(scipy.stats.kurtosis(kept.double().numpy().ravel()))
    for handle in handles:
        handle.remove()

    with torch.no_grad(), ActivationKurtosis(model) as kurtosis:
        for batch in batches:
            kurtosis.mask = batch["attention_mask"] if masked else None
            model(**batch)
    result = kurtosis.result()
    for name in names:
        assert result[name] == pytest.approx(np.mean(by_hand[name]), abs=1e-4)
    # A module that returns its child's tensor has its child's figure.
    assert result["roberta.encoder.layer.1.output"] == result["roberta.encoder.layer.1.output.LayerNorm"]


def test_padding_changes_nothing_under_the_mask():
    model = small_roberta()
    short, long = batch_of([12, 5, 8], 12), batch_of([12, 5, 8], 30)
    first, second = (watched(model, batch, batch["attention_mask"]) for batch in (short, long))
    assert first.keys() == second.keys() and "roberta.encoder.layer.1" in first
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-4), name
    unmasked = watched(model, long)
    assert unmasked["roberta.encoder.layer.1"] != pytest.approx(first["roberta.encoder.layer.1"], abs=1e-4)


def test_modules_not_laid_out_by_sequence_are_left_out_under_a_mask():
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    batch = batch_of([6, 4], 6)
    result = watched(model, batch, batch["attention_mask"])
    # BERT's positions are one row for the whole batch: no sequence of its own, so nothing to mask.
    assert "bert.embeddings.position_embeddings" not in result
    assert "bert.encoder.layer.0.attention.output.dense" in result


def test_removed_hooks_count_nothing_more():
    model = small_roberta()
    batch = batch_of([6], 6)
    with torch.no_grad(), ActivationKurtosis(model) as kurtosis:
        model(**batch)
    before = kurtosis.result()
    with torch.no_grad():
        model(**batch_of([3, 9], 9))
    assert kurtosis.result() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_restored_state_goes_on_to_the_same_mean():
    model = small_roberta()
    first, second = batch_of([6, 4], 6), batch_of([3, 9], 9)
    with torch.no_grad():
        with ActivationKurtosis(model) as whole:
            model(**first)
            model(**second)
        with ActivationKurtosis(model) as part:
            model(**first)
        with ActivationKurtosis(model) as rest:
            rest.load_state(part.state())
            model(**second)
    assert rest.result() == whole.result()
