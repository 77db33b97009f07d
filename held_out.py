"""The held-out text of the masked-LM: its masks, its batches and its loss, the same for every run and every arm.

SeededMaskingCollator   80/10/10 masks that depend on a seed and the batch's own tokens alone
held_out_batches        texts masked once and for all, sorted by length, padded
held_out_loss           mean cross-entropy over the masked tokens
kept_positions          lets the masked-LM head see chosen positions only, for it is half of the arithmetic
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

HELD_OUT_SEED = 0  # of the masks of the held-out text: the same for every run, so that runs compare


class SeededMaskingCollator(DataCollatorForLanguageModeling):
    """transformers' 80/10/10 masking, with masks that depend on `seed` and the batch's own tokens alone.

    So two arms see the same masks whatever random numbers their attention draws, in any number of loader workers, and
    after resuming in the middle. The same sample meets other masks in another epoch, because its batch is another.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        digest = np.random.SeedSequence([self.seed, *(token for example in examples for token in example["input_ids"])])
        self.generator = torch.Generator().manual_seed(int(digest.generate_state(1, np.uint64)[0] >> 1))
        # A batch without a masked token has no loss: its mean over nothing is NaN and would poison the weights. It
        # happens to the last, short batch of an epoch now and then; draw again.
        for _ in range(1_000):
            batch = super().torch_call(examples)
            if (batch["labels"] != -100).any():
                return batch
        raise ValueError("a batch holds nothing but special tokens, so nothing can be masked: look at the data")


def held_out_batches(dataset: Dataset, collator: SeededMaskingCollator, batch_size: int) -> list[dict]:
    """Masked and padded batches, the same for every run: a sample's masks depend on nothing but the sample."""
    samples = [collator([{"input_ids": ids}]) for ids in sorted(dataset["input_ids"], key=len)]
    pad = collator.tokenizer.pad_token_id
    batches = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]

        def stack(name: str, fill: int, chosen: list = chosen) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([sample[name][0] for sample in chosen], True, fill)

        batch = {"input_ids": stack("input_ids", pad), "labels": stack("labels", -100)}
        batches.append({**batch, "attention_mask": stack("attention_mask", 0)})
    return batches


@contextmanager
def kept_positions(model: PreTrainedModel, keep: Tensor) -> Iterator[None]:
    """Inside, the head of `model` sees the positions `keep` of the encoder's output only, as one row.

    The decoder is half of a masked-LM's matrix arithmetic (48 % with 84M parameters and 52,032 entries), and a loss
    needs 15 % of the positions.

    Args:
        model: a transformers model with a head on its `base_model`.
        keep: (batch, tokens), boolean. The logits are then (1, number kept, vocabulary), in the order of
            keep.nonzero().
    """

    def only_kept(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state[keep][None]
        return output

    handle = model.base_model.register_forward_hook(only_kept)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: list[dict], progress: bool = False) -> tuple[float, int]:
    """(mean cross-entropy in nats over all masked tokens, their number), in eval mode.

    The cross-entropy is taken in float32 whatever the model computes in.
    """
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    count = 0
    for batch in tqdm(batches, desc="Held-out loss", leave=False, disable=not progress):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        masked = labels != -100
        with kept_positions(model, masked):
            logits = model(**batch).logits[0]
        total += F.cross_entropy(logits.float(), labels[masked], reduction="sum").double()
        count += len(logits)
    model.train(training)
    return total.item() / count, count
