"""Masked-LM batches: padded, as the published run had them, or packed, without padding. Same samples, same masks.

A packed batch is one row, the real tokens of its samples one behind the other (S samples, T tokens, M of them masked):

    input_ids                       (1, T)
    position_ids                    (1, T)     begins again at padding_idx + 1 for every sample, as RoBERTa counts
    cu_seq_lens_q, cu_seq_lens_k    (S + 1,)   where the samples begin and end, int32
    max_length_q, max_length_k      int        tokens of the longest sample
    masked_positions                (M,)       of the masked tokens in the row
    labels                          (1, M)     their ids
    sequences                       int        S

The names from cu_seq_lens_q to max_length_k are those of transformers' FlashAttentionKwargs: the model hands them
down to its attention, which keeps the samples apart (softmax1.py). `keep_masked_positions` makes the model use the
rest: its head, half of the arithmetic of a small model with a large vocabulary, then runs where it has to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

IGNORED = -100  # label of a token that is not to be predicted: torch's and transformers' own
BOOKKEEPING = ("masked_tokens", "samples", "tokens", "sequences")  # of a batch, not for the model


class NothingToMask(ValueError):
    """A batch has no token that can be masked, and so no loss."""


@dataclass
class MaskedLMCollator(DataCollatorForLanguageModeling):
    """transformers' 80/10/10 masking, with masks that depend on `seed` and the batch's own tokens alone.

    So two arms see the same masks whatever random numbers their attention draws, padded or packed, in any number of
    loader workers and of processes, and after resuming in the middle. The same sample meets other masks in another
    epoch, because its batch is another.

    Beside what the model takes, a batch holds, counted over all processes,

        masked_tokens   float scalar: what the sum of the losses is to be divided by
        samples, tokens int; the tokens are the real ones

    Args, beside those of DataCollatorForLanguageModeling:
        packed: yield packed batches; else input_ids, attention_mask and labels, each (batch, tokens).
        bucket: see `pack`.
        process, processes: of the whole batch, yield the samples process, process + processes, ...
    """

    packed: bool = False
    bucket: int = 1
    process: int = 0
    processes: int = 1

    def torch_call(self, examples: list[dict]) -> dict[str, Tensor]:
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        tokens = torch.cat(rows)
        digest = np.random.SeedSequence([self.seed, *tokens.tolist()]).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator().manual_seed(int(digest >> 1))
        pad = self.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        special = torch.isin(input_ids, torch.tensor(self.tokenizer.all_special_ids))
        # A batch without a masked token has no loss: its mean over nothing is NaN and would poison the weights. It
        # happens to the last, short batch of an epoch now and then; draw again.
        for _ in range(1_000):
            # The stock collator writes into what it is given.
            masked, labels = self.torch_mask_tokens(input_ids.clone(), special_tokens_mask=special)
            if (labels != IGNORED).any():
                break
        else:
            raise NothingToMask(
                "a batch of samples holds nothing but special tokens, so nothing can be masked: look at the data"
            )
        whole = {
            "masked_tokens": (labels != IGNORED).sum().float(),
            "samples": len(examples),
            "tokens": len(tokens),
        }
        share = slice(self.process, None, self.processes)
        if self.process >= len(examples):  # of an epoch's last, smaller batch; a model needs something to run on
            share = slice(0, 1)
            labels = torch.full_like(labels, IGNORED)
        batch = {"input_ids": masked[share], "attention_mask": attention_mask[share], "labels": labels[share]}
        return (pack(batch, self.bucket, pad) if self.packed else batch) | whole


def pack(batch: dict[str, Tensor], bucket: int = 1, padding_idx: int = 1) -> dict[str, Tensor | int]:
    """The packed form of a padded batch (see the head of this file).

    With a bucket the row is filled up to a multiple of `bucket` tokens, and every shape follows from the number of
    samples and of tokens, so that a compiled model or a CUDA graph meets few shapes. The filling is one sample more,
    of padding tokens: they attend to each other alone, and nothing is predicted from them. `masked_positions` is filled
    up to a quarter of the row (or half, or all of it) with the first token, whose label is then ignored.

    Args:
        batch: input_ids, attention_mask and labels, each (batch, tokens), padded on the right.
        bucket: tokens; at most the model's longest sample. 1 for no filling.
        padding_idx: the id of <pad>.
    """
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    total = int(lengths.sum())
    filling = -total % bucket
    # Position padding_idx is the one whose embedding stays 0.
    positions = (torch.arange(real.shape[1]) + padding_idx + 1).expand_as(real)[real]
    labels = batch["labels"][real]
    masked_positions = (labels != IGNORED).nonzero()[:, 0]
    labels = labels[masked_positions]
    cu_seq_lens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    if bucket > 1:
        cu_seq_lens = F.pad(cu_seq_lens, (0, 1), value=total + filling)
        longest = max(bucket, 1 << (longest - 1).bit_length())  # a number the compiled attention is specialised on
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
    """Make a masked-LM model compute its head for packed batches where something is masked alone. In place.

    Given `masked_positions` (M,), its logits are (1, M, vocabulary), those of these positions, exactly; without, it
    is what it was. The class, its parameters and what save_pretrained writes stay as they are: a hook of the encoder
    picks the rows before the head sees them.
    """

    def pick(encoder, args, kwargs, output):
        if (positions := kwargs.get("masked_positions")) is not None:
            output.last_hidden_state = output.last_hidden_state[:, positions]
        return output

    model.base_model.register_forward_hook(pick, with_kwargs=True)
    return model


def on_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def summed_loss(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the masked tokens of a batch, summed, and how many they are; scalars on the device.

    `model` is RobertaForMaskedLM or what Trainer has wrapped around it; packed batches need one that
    experiment.accept_packed_batches has prepared.
    """
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    labels = inputs.pop("labels").flatten()
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), (labels != IGNORED).sum()
