"""Excess kurtosis against closed forms, scipy, and hooks written by hand."""

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SMALL
from transformers import RobertaConfig, RobertaForMaskedLM

from kurtosis import ActivationKurtosis, sequence_excess_kurtosis, weight_excess_kurtosis

MODEL = {**SMALL, "vocab_size": 60, "max_position_embeddings": 40}


def small_roberta():
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**MODEL)).eval()


def batch_of(lengths, width):
    """input_ids and attention_mask of sequences of these lengths, padded to `width`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), width), 1)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 60, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def excess_kurtosis(values):
    """Of all entries, in float64."""
    return sequence_excess_kurtosis(values.double().reshape(1, -1))[0]


def test_closed_forms():
    generator = torch.Generator().manual_seed(0)
    n = 1_000_000
    # Standard errors of the sample kurtosis: sqrt(24 / n) = 0.005 for a Gaussian, 0.0015 for a uniform distribution.
    assert abs(excess_kurtosis(torch.randn(n, generator=generator))) < 0.025
    assert abs(excess_kurtosis(torch.rand(n, generator=generator)) + 1.2) < 0.008
    assert excess_kurtosis(torch.tensor([1.0, -1.0]).repeat(500)) == -2
    # Two values, one of them with probability p = 1/100: the excess kurtosis is 1 / (p (1 - p)) - 6.
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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1000.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_have_no_kurtosis(value, dtype):
    constant = torch.full((2, 37, 16), value, dtype=dtype)
    assert excess_kurtosis(constant).isnan()
    assert sequence_excess_kurtosis(constant).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    # 300^4 = 8e9 is far above float16's 65504.
    values = (torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(5)) * 300).to(dtype)
    expected = scipy.stats.kurtosis(values.double().flatten(1).numpy(), axis=1)
    result = sequence_excess_kurtosis(values)
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


def test_activation_kurtosis_equals_hooks_by_hand():
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
            by_hand[name] += [scipy.stats.kurtosis(output.double().numpy().ravel()) for output in outputs[name]]
    for handle in handles:
        handle.remove()

    with torch.no_grad(), ActivationKurtosis(model) as kurtosis:
        for batch in batches:
            model(**batch)
    result = kurtosis.result()
    for name in names:
        assert result[name] == pytest.approx(np.mean(by_hand[name]), abs=1e-4)
    # A module that returns the tensor of its child has the same kurtosis.
    assert result["roberta.encoder.layer.1.output"] == result["roberta.encoder.layer.1.output.LayerNorm"]


def test_removed_hooks_count_nothing():
    model = small_roberta()
    batch = batch_of([6], 6)
    with torch.no_grad(), ActivationKurtosis(model) as kurtosis:
        model(**batch)
    before = kurtosis.result()
    with torch.no_grad():
        model(**batch_of([3, 9], 9))
    assert kurtosis.result() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_restored_state_leads_to_the_same_mean():
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
