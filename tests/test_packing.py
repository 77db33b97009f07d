"""Padded and packed masked-LM batches: masks like those of the stock collator, and equal losses and gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURE
from datasets import Dataset
from scipy import stats
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, RobertaConfig, RobertaForMaskedLM

from kurtosis import ActivationKurtosis
from packing import BOOKKEEPING, IGNORED, MaskedLMCollator, keep_masked_positions, pack
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n

SMALL = {**ARCHITECTURE, "vocab_size": 1024, "initializer_range": 0.1}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = [9, 3, 40, 17, 3, 25, 12, 33]


def small_model(n):
    torch.manual_seed(0)
    if n == 0:
        return apply_softmax_n(RobertaForMaskedLM(RobertaConfig(**SMALL)), 0)
    return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=n, **SMALL))


def collator(sample, seed=1, **settings):
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
    return MaskedLMCollator(tokenizer, mlm_probability=0.15, seed=seed, **settings)


def examples(lengths=(40,) * 64):
    random = np.random.default_rng(0)
    return [{"input_ids": [0, *random.integers(5, 1000, length).tolist(), 2]} for length in lengths]


def same(batch, other):
    return batch.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(other[name])) for name in batch
    )


def forward(model, batch):
    """(mean loss over the masked tokens, their logits)."""
    labels = batch["labels"].flatten()
    inputs = {name: value for name, value in batch.items() if name not in (*BOOKKEEPING, "labels")}
    logits = model(**inputs).logits.flatten(0, 1)
    masked = labels != IGNORED
    return F.cross_entropy(logits, labels, ignore_index=IGNORED), logits[masked]


# -------------------------------------------------------------------------------------------------------------- masks


def test_masks_depend_only_on_the_seed_and_the_batch(sample):
    batch = examples()
    first = collator(sample)(batch)
    torch.rand(7)  # other random numbers do not matter
    again = collator(sample)
    again(batch[:5])
    again = again(batch)
    assert same(first, again)
    assert not torch.equal(first["labels"], collator(sample, seed=2)(batch)["labels"])
    assert not torch.equal(first["labels"][1:], collator(sample)(batch[1:])["labels"])


def test_masking_agrees_with_the_stock_collator(sample):
    ours = collator(sample)
    batch = examples((40,) * 400)
    result = ours(batch)
    stock = DataCollatorForLanguageModeling(ours.tokenizer, mlm_probability=0.15, seed=0)
    ours(batch)  # the seed of its generator is that of this batch
    stock.generator = torch.Generator().manual_seed(ours.generator.initial_seed())
    expected = stock(batch)
    assert torch.equal(result["attention_mask"], expected["attention_mask"])
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    # 15 % are masked: 80 % of them as <mask>, 10 % as a random token, 10 % unchanged. Within 5 standard errors.
    chosen = result["labels"] != -100
    count = chosen.sum().item()
    shares = [
        count / (400 * 40),
        (result["input_ids"][chosen] == ours.tokenizer.mask_token_id).float().mean().item(),
        (result["input_ids"][chosen] == result["labels"][chosen]).float().mean().item(),
    ]
    for share, expected_share, size in zip(shares, (0.15, 0.8, 0.1), (16000, count, count), strict=True):
        assert abs(share - expected_share) < 5 * math.sqrt(expected_share * (1 - expected_share) / size)
    assert not chosen[:, 0].any() and not chosen[:, -1].any()


def test_every_batch_has_a_masked_token(sample):
    lonely = [{"input_ids": [0, 77, 2]}]  # its token is masked in 15 of 100 draws
    assert all((collator(sample, seed)(lonely)["labels"] != -100).any() for seed in range(20))
    with pytest.raises(ValueError, match="nothing can be masked"):
        collator(sample)([{"input_ids": [0, 2]}])


def test_loader_workers_change_nothing(sample):
    data = Dataset.from_list(examples(LENGTHS * 4))
    by_workers = [
        list(DataLoader(data, 4, collate_fn=collator(sample, packed=True), num_workers=workers)) for workers in (0, 2)
    ]
    assert len(by_workers[0]) == 8
    assert all(same(ours, theirs) for ours, theirs in zip(*by_workers, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_processes_divide_the_batch_of_one_process(sample, packed):
    batch = examples(LENGTHS)
    whole = collator(sample)(batch)
    shares = [collator(sample, packed=packed, rank=rank, world_size=3)(batch) for rank in range(3)]
    found = []
    for process, share in enumerate(shares):
        assert [share[name] for name in BOOKKEEPING[:3]] == [whole[name] for name in BOOKKEEPING[:3]]
        mine = slice(process, None, 3)
        rows = {name: whole[name][mine] for name in ("input_ids", "attention_mask", "labels")}
        expected = pack(rows) if packed else rows
        assert all(torch.equal(torch.as_tensor(share[name]), torch.as_tensor(expected[name])) for name in expected)
        found.append((share["labels"] != IGNORED).sum())
    assert sum(found) == whole["masked_tokens"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_process_without_a_sample_has_a_batch_without_loss(sample, packed):
    share = collator(sample, packed=packed, rank=2, world_size=3)(examples([5, 6]))
    assert (share["labels"] == IGNORED).all() and share["input_ids"].numel()
    model = keep_masked_positions(small_model(1))
    labels = share["labels"].flatten()
    inputs = {name: value for name, value in share.items() if name not in (*BOOKKEEPING, "labels")}
    logits = model(**inputs).logits.flatten(0, 1)
    F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ packing


def test_layout_by_hand():
    padded = {
        "input_ids": torch.tensor([[0, 7, 2, 1], [0, 4, 9, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, -100], [-100, 8, 9, -100]]),
    }
    packed = pack(padded)
    assert packed["input_ids"].tolist() == [[0, 7, 2, 0, 4, 9, 2]]
    assert packed["position_ids"].tolist() == [[2, 3, 4, 2, 3, 4, 5]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 7]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 4
    assert packed["masked_positions"].tolist() == [4, 5] and packed["labels"].tolist() == [[8, 9]]
    assert packed["sequences"] == 2
    filled = pack(padded, bucket=4)
    assert filled["input_ids"].tolist() == [[0, 7, 2, 0, 4, 9, 2, 1]]
    assert filled["position_ids"].tolist() == [[2, 3, 4, 2, 3, 4, 5, 1]]
    assert filled["cu_seq_lens_q"].tolist() == [0, 3, 7, 8]
    assert filled["masked_positions"].tolist() == [4, 5] and filled["labels"].tolist() == [[8, 9]]
    assert filled["sequences"] == 2


def test_buckets_leave_few_shapes(sample):
    shapes = set()
    masks = collator(sample, packed=True, bucket=64)
    for start in range(40):
        random = np.random.default_rng(start)
        batch = masks(examples(random.integers(1, 40, 16).tolist()))
        shapes.add(
            (batch["input_ids"].shape, batch["labels"].shape, len(batch["cu_seq_lens_q"]), batch["max_length_q"])
        )
        assert batch["input_ids"].shape[1] % 64 == 0
    assert len({shape[0] for shape in shapes}) > 1
    assert len(shapes) == len({shape[0] for shape in shapes})  # the other shapes depend only on the number of tokens


@pytest.mark.parametrize("n", [0, 0.5, 1])
@pytest.mark.parametrize("bucket", [1, 64])
def test_packed_and_padded_loss_and_gradients_agree(sample, n, bucket):
    """Compared with float64, the error of the packed batch is at most twice that of the padded one (gradients: 3 x)."""
    padded = collator(sample)(examples(LENGTHS))
    packed = collator(sample, packed=True, bucket=bucket)(examples(LENGTHS))
    found = []
    for batch, dtype in ((padded, torch.float64), (padded, torch.float32), (packed, torch.float32)):
        model = keep_masked_positions(small_model(n)).to(dtype)
        loss, logits = forward(model, batch)
        loss.backward()
        found.append({"loss": loss.detach(), "logits": logits.detach()})
        found[-1] |= {name: parameter.grad for name, parameter in model.named_parameters()}
    truth, yardstick, ours = found
    for name, expected in truth.items():
        factor = 2 if name in ("loss", "logits") else 3
        floor = torch.finfo(torch.float32).eps * expected.abs().max()
        error = (ours[name].double() - expected).abs().max()
        assert error <= factor * (yardstick[name].double() - expected).abs().max() + floor, name


def test_samples_of_a_packed_batch_do_not_attend_to_each_other(sample):
    model = keep_masked_positions(small_model(1)).eval()
    batch = collator(sample, packed=True)(examples(LENGTHS))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, : LENGTHS[0] + 2] = 7
    theirs = batch["masked_positions"] >= LENGTHS[0] + 2
    with torch.no_grad():
        first, second = forward(model, batch)[1], forward(model, other)[1]
    assert torch.equal(first[theirs], second[theirs])
    assert not torch.equal(first[~theirs], second[~theirs])


def test_logits_at_the_masked_positions_are_unchanged(sample):
    model = small_model(1).eval()
    batch = collator(sample)(examples(LENGTHS))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**inputs).logits
    keep_masked_positions(model)
    assert torch.equal(model(**inputs).logits, whole)
    positions = torch.tensor([0, 2, 4])
    picked = model(**inputs, masked_positions=positions).logits
    assert picked.shape == (len(LENGTHS), 3, SMALL["vocab_size"])
    assert_close(picked, whole[:, positions])


# --------------------------------------------------------------------------------------------- statistics of a packed


@pytest.mark.parametrize("bucket", [1, 64])
def test_kurtosis_of_a_packed_batch_is_that_of_its_samples(sample, bucket):
    model = keep_masked_positions(small_model(1)).eval()
    padded = collator(sample)(examples(LENGTHS))
    packed = collator(sample, packed=True, bucket=bucket)(examples(LENGTHS))
    masked = padded["labels"] != IGNORED
    assert not masked.any(1).all()  # one sample without a masked token is among them
    with torch.no_grad():
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        with ActivationKurtosis(model) as expected:
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
                model.base_model(ids[mask][None])  # each sample alone, so without padding
        head = {}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: head.update({name: out}))
            for name in ("lm_head.dense", "lm_head.decoder")
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        whole = ActivationKurtosis(model)
        whole.packed = packed
        for _ in range(2):
            with whole:
                forward(model, packed)
    result = whole.result()
    for name, value in expected.result().items():
        assert result[name] == pytest.approx(value, abs=1e-4), name
    for name, activations in head.items():
        by_hand = [
            stats.kurtosis(row[chosen].double().numpy(), axis=None)
            for row, chosen in zip(activations, masked, strict=True)
            if chosen.any()
        ]
        assert result[name] == pytest.approx(np.mean(by_hand), abs=1e-4), name
    assert whole.state()["lm_head.decoder"][1] == 2 * masked.any(1).sum()
    assert whole.state()["roberta.encoder.layer.0"][1] == 2 * len(LENGTHS)
