"""The held-out text of the masked-LM: its masks, its batches and its loss, the same for every run and every arm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import Hooks
from packing import IGNORED, MaskedLMCollator

HELD_OUT_SEED = 0  # of the masks of the held-out text: the same for every run, so that runs compare


def evenly_spread(total: int, count: int) -> np.ndarray:
    """Indices of `count` of `total` items, evenly spread from the first to the last; all indices if there are fewer.

    A split holds one source after the other, so its first items would not be representative.
    """
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def longest_text(model: PreTrainedModel) -> int:
    """Number of tokens that the model has positions for; RoBERTa counts positions from its padding id + 1."""
    return model.config.max_position_embeddings - (model.config.pad_token_id or 0) - 1


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def held_out_batches(dataset: Dataset, collator: MaskedLMCollator, batch_size: int) -> list[dict]:
    """Masked batches, sorted by length and padded: input_ids, labels and attention_mask (B, T).

    A sample's mask depends only on the sample and the collator's seed, so it is the same for every run. The collator
    must be that of a single process.
    """
    samples = [collator([{"input_ids": ids}]) for ids in sorted(dataset["input_ids"], key=len)]
    filling = {"input_ids": collator.tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
    return _padded([{name: sample[name][0] for name in filling} for sample in samples], filling, batch_size)


def padded_batches(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], batch_size: int) -> list[dict]:
    """Batches of unmasked texts, sorted by length to need little padding: input_ids and attention_mask (B, T)."""
    texts = [torch.tensor(text) for text in sorted(ids, key=len)]
    samples = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts]
    return _padded(samples, {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}, batch_size)


def _padded(samples: list[dict[str, Tensor]], filling: dict[str, int], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of consecutive samples; each tensor (tokens,) is padded on the right with its value of `filling`."""
    return [
        {
            name: pad_sequence([sample[name] for sample in samples[start : start + batch_size]], True, fill)
            for name, fill in filling.items()
        }
        for start in range(0, len(samples), batch_size)
    ]


def losses_without_context(
    train: Dataset, batches: list[dict], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[float, float]:
    """The losses of models without context: (unigram loss, context-free loss) in nats per masked token.

    The unigram loss is the cross-entropy of the token frequencies p of the training split (one is added to every
    count, special tokens are left out). The context-free loss also uses how tokens are masked: in place of a masked
    token, the input has the token itself in 10 % of cases, and a random one of V tokens in 10 %. By Bayes' rule

        P(w | v is shown) = p(w) (1[w = v] + 1/V) / (p(v) + 1/V)

    and where <mask> is shown, only p is known. No model without context has a lower expected loss.

    Args:
        train: tokenized training split.
        batches: of `held_out_batches`.
        tokenizer: has the special tokens, and the V entries from which random tokens are drawn.
        vocab_size: number of rows of the embedding.
    """
    counts = np.ones(vocab_size)
    for batch in train.with_format("numpy").iter(batch_size=10_000):
        counts += np.bincount(np.concatenate(batch["input_ids"]), minlength=vocab_size)
    counts[tokenizer.all_special_ids] = 0
    p = torch.from_numpy(counts / counts.sum())
    entries = len(tokenizer)
    unigram, gained = [], []
    for batch in batches:
        masked = batch["labels"] != IGNORED
        labels, shown = batch["labels"][masked], batch["input_ids"][masked]
        visible = shown != tokenizer.mask_token_id
        ratio = ((shown == labels).double() + 1 / entries) / (p[shown] + 1 / entries)  # P(w | v is shown) / p(w)
        unigram.append(-p[labels].log())
        gained.append(torch.where(visible, ratio, 1.0).log())
    unigram, gained = torch.cat(unigram), torch.cat(gained)
    return unigram.mean().item(), (unigram - gained).mean().item()


@contextmanager
def kept_positions(model: PreTrainedModel, keep: Tensor) -> Iterator[None]:
    """A context in which the head of `model` runs only on the positions `keep` of the encoder's output, as one row.

    The decoder takes half of a masked-LM's matrix arithmetic (48 % with 84M parameters and 52,032 entries), and a loss
    needs 15 % of the positions only.

    Args:
        model: a transformers model with a head on its `base_model`.
        keep: (batch, tokens), boolean. The logits are then (1, number kept, vocabulary), in the order of
            keep.nonzero().
    """

    def only_kept(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state[keep][None]
        return output

    with Hooks([(model.base_model, only_kept)]):
        yield


def masked_loss(model: PreTrainedModel, batch: dict[str, Tensor], reduction: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the masked tokens of a batch, in float32, even if the model computes in another format.

    Args:
        model: a masked-LM.
        batch: input_ids, attention_mask and labels (B, T), on the model's device.
        reduction: "sum" or "none", as in torch.

    Returns:
        (nats: a scalar or (M,), masked: (B, T), boolean), for M masked tokens in the order of masked.nonzero().
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    masked = batch["labels"] != IGNORED
    with kept_positions(model, masked):
        logits = model(**inputs).logits[0]
    return F.cross_entropy(logits.float(), batch["labels"][masked], reduction=reduction), masked


@torch.no_grad()
def per_text_loss(model: PreTrainedModel, batches: list[dict], progress: bool = False) -> Tensor:
    """Sum of the cross-entropy and number of masked tokens of every text, in eval mode, by this process alone.

    Args:
        model: a masked-LM.
        batches: of `held_out_batches`.
        progress: show a progress bar.

    Returns:
        (texts, 2), float64, on the CPU: nats and masked tokens, in the order of the batches.
    """
    training = model.training
    model.eval()
    sums = [torch.zeros(0, 2, dtype=torch.float64)]
    for batch in tqdm(batches, desc="Held-out loss", leave=False, disable=not progress):
        nats, masked = masked_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, "none")
        losses = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
        losses[masked] = nats.double()
        sums.append(torch.stack([losses.sum(1), masked.sum(1).double()], 1).cpu())
    model.train(training)
    return torch.cat(sums)


def held_out_loss(model: PreTrainedModel, batches: list[dict], progress: bool = False) -> tuple[float, int]:
    """(mean cross-entropy in nats over all masked tokens, their number); the texts are divided among the processes."""
    distributed = torch.distributed.is_initialized()
    if distributed:
        batches = batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    total = per_text_loss(model, batches, progress).sum(0).to(model.device)
    if distributed:
        torch.distributed.all_reduce(total)
    loss, count = total.tolist()
    return loss / count, int(count)
