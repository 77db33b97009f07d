"""What the experiment is, each fact once: its sizes, its arms and their names, its models.

An arm is a kind of attention: softmax_n with a number n (softmax0, softmax1, softmax0.5, ...), with an n for each head
that is trained (softmax_learned), or one of the published REMEDIES. All arms of a seed start from the same weights.
"""

from __future__ import annotations

from argparse import ArgumentTypeError

from transformers import PreTrainedModel, PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM, set_seed
from transformers.activations import ACT2FN

from controls import CONTROLS, GATE, build_control
from packing import keep_masked_positions
from softmax1 import LEARNED, RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n
from tables import shortest

# ------------------------------------------------------------------------------------------- the published experiment

VOCAB_SIZE = 52_032  # a multiple of 64, for the matrix units of GPUs
MAX_LENGTH = 512  # tokens of a sample; the rest is cut off
# With this vocabulary it has 84M parameters. RoBERTa counts positions from padding_idx + 1 = 2.
ARCHITECTURE = {"num_hidden_layers": 6, "max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}
MLM_PROBABILITY = 0.15  # share of the tokens that are masked, 80/10/10
EFFECTIVE_BATCH_SIZE = 16  # samples of an update, whatever the number of processes
STEPS = 285_899  # one epoch of 4.57M samples
SEED = 42

# --------------------------------------------------------------------------------------------------------- the arms

BASELINE = "softmax0"  # every other arm is compared with it, paired by seed
PRIMARY_ARM = "softmax1"  # the remedy that was proposed
REMEDIES = tuple(CONTROLS)  # published ones, trained beside them: clipped, gated
# In the names of the parameters that an arm has beyond softmax0: gates, and learned sinks.
OWN_PARAMETERS = (GATE, ".log_n")


def read_softmax_n(text: str) -> float | str:
    """--softmax_n as it is given: a number, or "learned". ArgumentTypeError for anything else."""
    try:
        return text if text == LEARNED else float(text)
    except ValueError:
        raise ArgumentTypeError(f"softmax_n needs a number n >= 0, or {LEARNED}, got {text!r}") from None


def arm_name(softmax_n: float | str, control: str | None = None) -> str:
    """softmax0, softmax1, softmax0.5, softmax_learned: different n never share a name. A remedy is an arm by itself."""
    if control:
        return control
    return f"softmax_{LEARNED}" if softmax_n == LEARNED else f"softmax{shortest(softmax_n)}"


def run_name(softmax_n: float | str, seed: int, control: str | None = None) -> str:
    """esperberto-softmax1, with the seed behind it when it is not the published 42."""
    return f"esperberto-{arm_name(softmax_n, control)}" + ("" if seed == SEED else f"-seed{seed}")


def arm_order(softmax_n: float | str, control: str | None = None) -> tuple:
    """What arms are sorted by: numbers n, then learned sinks, then remedies."""
    return control or "", softmax_n == LEARNED, 0.0 if softmax_n == LEARNED else softmax_n


# -------------------------------------------------------------------------------------------------------- their models


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


def longest_text(overrides: dict) -> int:
    """Tokens of a text at most, of a model with these changes to the published architecture."""
    return (ARCHITECTURE | overrides)["max_position_embeddings"] - 2


def build_model(
    softmax_n: float | str,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    overrides: dict | None = None,
    control: str | None = None,
) -> PreTrainedModel:
    """RoBERTa with random weights that depend on `seed` alone: arms with the same seed start from the same point.

    n = 0 is the stock class, so that a softmax model needs none of our code.

    Args:
        softmax_n: n of the attention, or "learned": a trained one for each head, which starts at 1.
        vocab_size: rows of the embedding.
        tokenizer: gives the ids of its special tokens.
        seed: of the weights.
        overrides: changes to the published architecture, of `config_overrides`.
        control: one of REMEDIES in place of softmax_n (controls.py).
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


def accept_packed_batches(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model take packed batches too, in place: softmax0 then goes through our attention, with n = 0."""
    return keep_masked_positions(apply_softmax_n(model, getattr(model.config, "softmax_n", 0.0)))
