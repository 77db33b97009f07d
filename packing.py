"""Masked-LM batches: padded, as in the published run, or packed, without padding. Same samples, same masks.

A packed batch is one row with the tokens of its samples one after another (S samples, T tokens, M of them masked):

    input_ids                       (1, T)
    position_ids                    (1, T)     start again at padding_idx + 1 for every sample, as in RoBERTa
    cu_seq_lens_q, cu_seq_lens_k    (S + 1,)   where the samples start and end, int32
    max_length_q, max_length_k      int        tokens in the longest sample
    masked_positions                (M,)       positions of the masked tokens in the row
    labels                          (1, M)     original ids of the masked tokens
    sequences                       int        S

The names from cu_seq_lens_q to max_length_k are those of transformers' FlashAttentionKwargs: the model passes them to
its attention, which keeps the samples apart (softmax1.py). `keep_masked_positions` makes the model use
masked_positions: its head, half of the arithmetic of a small model with a large vocabulary, then runs only there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

IGNORED = -100  # label of a token that is not predicted, as in torch and transformers
BOOKKEEPING = ("masked_tokens", "samples", "tokens", "sequences")  # entries of a batch that the model does not get


class NothingToMask(ValueError):
    """A batch has no token that can be masked, and therefore no loss."""


@dataclass
class MaskedLMCollator(DataCollatorForLanguageModeling):
    """transformers' 80/10/10 masking, with masks that depend only on `seed` and on the tokens of the batch.

    So all arms get the same masks, whatever random numbers their attention draws: padded or packed, with any number of
    loader workers and of processes, and after a resumption. In another epoch a sample is in another batch, and so gets
    other masks.

    A batch contains the inputs of the model and, counted over all processes,

        masked_tokens   float scalar, by which the sum of the losses has to be divided
        samples, tokens int; tokens without padding

    Args, in addition to those of DataCollatorForLanguageModeling:
        packed: return packed batches; otherwise input_ids, attention_mask and labels, each (batch, tokens).
        bucket: see `pack`.
        rank, world_size: return the samples rank, rank + world_size, ... of the whole batch.
    """

    packed: bool = False
    bucket: int = 1
    rank: int = 0
    world_size: int = 1

    def torch_call(self, examples: list[dict]) -> dict[str, Tensor]:
        samples = [torch.tensor(example["input_ids"]) for example in examples]
        tokens = torch.cat(samples)
        digest = np.random.SeedSequence([self.seed, *tokens.tolist()]).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator().manual_seed(int(digest >> 1))
        pad = self.tokenizer.pad_token_id
        input_ids = pad_sequence(samples, batch_first=True, padding_value=pad)
        attention_mask = pad_sequence([torch.ones_like(sample) for sample in samples], batch_first=True)
        special = torch.isin(input_ids, torch.tensor(self.tokenizer.all_special_ids))
        # Without a masked token the mean loss is NaN, which would spread to all weights. This happens now and then in
        # the last, short batch of an epoch: draw again.
        for _ in range(1_000):
            # A clone, because the inherited method changes its argument.
            masked, labels = self.torch_mask_tokens(input_ids.clone(), special_tokens_mask=special)
            if (labels != IGNORED).any():
                break
        else:
            raise NothingToMask(
                "a batch of samples holds nothing but special tokens, so nothing can be masked: look at the data"
            )
        masked_tokens = (labels != IGNORED).sum().float()
        counts = {"masked_tokens": masked_tokens, "samples": len(examples), "tokens": len(tokens)}
        rows = slice(self.rank, None, self.world_size)
        if self.rank >= len(examples):  # an epoch's last batch is too small: run the model on a sample without labels
            rows = slice(0, 1)
            labels = torch.full_like(labels, IGNORED)
        batch = {"input_ids": masked[rows], "attention_mask": attention_mask[rows], "labels": labels[rows]}
        return (pack(batch, self.bucket, pad) if self.packed else batch) | counts


def pack(batch: dict[str, Tensor], bucket: int = 1, padding_idx: int = 1) -> dict[str, Tensor | int]:
    """The packed form of a padded batch (see the head of this file).

    With a bucket the row is padded to a multiple of `bucket` tokens, and every shape depends only on the numbers of
    samples and of tokens, so that a compiled model or a CUDA graph gets few different shapes. The padding is one
    additional sample of <pad> tokens: they attend only to each other, and nothing is predicted from them.
    `masked_positions` is padded with position 0, whose label is IGNORED, to a quarter of the row, half, or all of it.

    Args:
        batch: input_ids, attention_mask and labels, each (batch, tokens), padded on the right.
        bucket: tokens; at most the model's longest sample. 1 for no padding.
        padding_idx: the id of <pad>.
    """
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    total = int(lengths.sum())
    filling = -total % bucket  # padding tokens
    # padding_idx itself is the position of padding, whose embedding stays 0.
    positions = (torch.arange(real.shape[1]) + padding_idx + 1).expand_as(real)[real]
    labels = batch["labels"][real]
    masked_positions = (labels != IGNORED).nonzero()[:, 0]
    labels = labels[masked_positions]
    cu_seq_lens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    if bucket > 1:
        cu_seq_lens = F.pad(cu_seq_lens, (0, 1), value=total + filling)
        longest = max(bucket, 1 << (longest - 1).bit_length())  # the compiled attention is specialised on this number
        room = (total + filling) // 4
        while room < len(labels):
            room *= 2
        masked_positions = F.pad(masked_positions, (0, room - len(masked_positions)))
        labels = F.pad(labels, (0, room - len(labels)), value=IGNORED)
    return {
        "input_ids": F.pad(batch["input_ids"][real], (0, filling), value=padding_idx)[None],
        "position_ids": F.pad(positions, (0, filling), value=padding_idx)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        "masked_positions": masked_positions,
        "labels": labels[None],
        "sequences": len(lengths),
    }


def keep_masked_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Make a masked-LM model compute the logits of packed batches at the masked positions only, in place.

    With `masked_positions` (M,) its logits are (1, M, vocabulary), exactly those of these positions; otherwise the
    model is unchanged. Its class, its parameters and the files of save_pretrained remain the same: a hook of the
    encoder selects the rows before the head gets them.
    """

    def pick(encoder, args, kwargs, output):
        if (positions := kwargs.get("masked_positions")) is not None:
            output.last_hidden_state = output.last_hidden_state[:, positions]
        return output

    model.base_model.register_forward_hook(pick, with_kwargs=True)
    return model


def on_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def summed_loss(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed cross-entropy of the masked tokens of a batch, their number), both scalars on the device.

    `model` is a RobertaForMaskedLM, or Trainer's wrapper around it. For packed batches it must have been changed by
    experiment.accept_packed_batches.
    """
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    labels = inputs.pop("labels").flatten()
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum()
