"""The arms of the experiment: RoBERTa with random weights, which differ in the n of softmax_n and in nothing else."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM, set_seed

from packing import keep_masked_positions
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n
from tables import shortest

# The published architecture; with a vocabulary of 52,032 it has 84M parameters. 514 positions are 512 tokens, because
# RoBERTa counts them from padding_idx + 1 = 2.
ARCHITECTURE = {"num_hidden_layers": 6, "max_position_embeddings": 514, "type_vocab_size": 1}


def arm_name(softmax_n: float) -> str:
    """softmax0, softmax1, softmax0.5: different n never share a name."""
    return f"softmax{shortest(softmax_n)}"


def build_model(softmax_n: float, vocab_size: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """RoBERTa with random weights that depend on `seed` alone: arms with the same seed start from the same point.

    n = 0 is the stock class, so that a softmax model needs none of our code.
    """
    settings = {
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **ARCHITECTURE,
    }
    set_seed(seed)
    if softmax_n == 0:
        return RobertaForMaskedLM(RobertaConfig(softmax_n=0.0, **settings))  # stock RoBERTa ignores the field
    return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=softmax_n, **settings))


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model take packed batches too, in place: softmax0 then goes through our attention, with n = 0."""
    return keep_masked_positions(apply_softmax_n(model, getattr(model.config, "softmax_n", 0.0)))
