"""The arms of the experiment: RoBERTa with random weights, which differ in the n of softmax_n and in nothing else."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM, set_seed
from transformers.activations import ACT2FN

from controls import build_control
from packing import keep_masked_positions
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n
from tables import shortest

# The published architecture; with a vocabulary of 52,032 it has 84M parameters. 514 positions are 512 tokens, because
# RoBERTa counts them from padding_idx + 1 = 2.
ARCHITECTURE = {"num_hidden_layers": 6, "max_position_embeddings": 514, "type_vocab_size": 1}


def arm_name(softmax_n: float, control: str | None = None) -> str:
    """softmax0, softmax1, softmax0.5: different n never share a name. A control is an arm by itself: clipped, gated."""
    return control or f"softmax{shortest(softmax_n)}"


def run_name(softmax_n: float, seed: int, control: str | None = None) -> str:
    """esperberto-softmax1, with the seed behind it when it is not the published 42."""
    return f"esperberto-{arm_name(softmax_n, control)}" + ("" if seed == 42 else f"-seed{seed}")


# What --config_overrides may change of RobertaConfig, and how a value is read. The rest is fixed by the data
# (vocabulary, special tokens), by the comparison (the attention), or would not train a masked language model.
OVERRIDES = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "hidden_act": str,
    "hidden_dropout_prob": float,
    "attention_probs_dropout_prob": float,
    "initializer_range": float,
    "layer_norm_eps": float,
}


def config_overrides(text: str) -> dict[str, int | float | str]:
    """The changes to the architecture in "num_hidden_layers=4,hidden_size=256", in the order of their names.

    Raises:
        ValueError: a key that cannot be changed, a value of the wrong kind, or an architecture that cannot be built.
    """
    changes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in OVERRIDES:
            raise ValueError(
                f"--config_overrides takes NAME=VALUE,... with a name out of {', '.join(OVERRIDES)}: {item!r}"
            )
        if key in changes:
            raise ValueError(f"--config_overrides names {key} twice")
        try:
            changes[key] = OVERRIDES[key](value)
        except ValueError:
            raise ValueError(f"--config_overrides: {key} needs a number, got {value!r}") from None
        _check_override(key, changes[key])
    whole = RobertaConfig(**{**ARCHITECTURE, **changes})
    if whole.hidden_size % whole.num_attention_heads:
        raise ValueError(
            f"--config_overrides: hidden_size {whole.hidden_size} is no multiple of {whole.num_attention_heads} heads"
        )
    return dict(sorted(changes.items()))


def _check_override(key: str, value: int | float | str) -> None:
    """Raise ValueError for a value that no model has."""
    if key == "hidden_act":
        possible = value in ACT2FN
    elif key.endswith("_prob"):
        possible = 0 <= value < 1
    elif key == "max_position_embeddings":
        possible = 5 <= value <= 1 << 20  # two of them are never used, and a sample has <s>, a token and </s>
    elif OVERRIDES[key] is int:
        possible = 1 <= value <= 1 << 20
    else:
        possible = 0 < value <= 1
    if not possible:
        raise ValueError(f"--config_overrides: {key} cannot be {value}")


def build_model(
    softmax_n: float,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    overrides: dict | None = None,
    control: str | None = None,
) -> PreTrainedModel:
    """RoBERTa with random weights that depend on `seed` alone: arms with the same seed start from the same point.

    n = 0 is the stock class, so that a softmax model needs none of our code.

    Args:
        softmax_n: n of the attention.
        vocab_size: rows of the embedding.
        tokenizer: gives the ids of its special tokens.
        seed: of the weights.
        overrides: changes to the published architecture, of `config_overrides`.
        control: "clipped" or "gated" for a published remedy in place of softmax_n (controls.py).
    """
    settings = {
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **ARCHITECTURE,
        **(overrides or {}),
    }
    set_seed(seed)
    if control is not None:
        return build_control(control, settings)
    if softmax_n == 0:
        return RobertaForMaskedLM(RobertaConfig(softmax_n=0.0, **settings))  # stock RoBERTa ignores the field
    return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=softmax_n, **settings))


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model take packed batches too, in place: softmax0 then goes through our attention, with n = 0."""
    return keep_masked_positions(apply_softmax_n(model, getattr(model.config, "softmax_n", 0.0)))
