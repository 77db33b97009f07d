"""The definition of the experiment, each fact once: its sizes, its arms and their names, its models.

An arm is a kind of attention: softmax_n with a number n (softmax0, softmax1, softmax0.5, ...), softmax_n with a trained
n for each head (softmax_learned), or one of the published REMEDIES. All arms of a seed start from the same weights.
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

VOCAB_SIZE = 52_032  # a multiple of 64, which suits the matrix units of GPUs
MAX_LENGTH = 512  # tokens of a sample; longer ones are cut off
# With this vocabulary the model has 84M parameters. RoBERTa counts positions from padding_idx + 1 = 2.
ARCHITECTURE = {"num_hidden_layers": 6, "max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}
MLM_PROBABILITY = 0.15  # share of the tokens that are masked, 80/10/10
EFFECTIVE_BATCH_SIZE = 16  # samples in an update, over all processes and accumulation steps
STEPS = 285_899  # one epoch of 4.57M samples
SEED = 42

# --------------------------------------------------------------------------------------------------------- the arms

BASELINE = "softmax0"  # every other arm is compared with it, paired by seed
PRIMARY_ARM = "softmax1"  # the remedy that was proposed
REMEDIES = tuple(CONTROLS)  # other published remedies: clipped softmax and gated attention
# Parts of the names of parameters that softmax0 lacks: gates, and learned sinks.
OWN_PARAMETERS = (GATE, ".log_n")


def read_softmax_n(text: str) -> float | str:
    """The value of --softmax_n: a number, or "learned". Raises ArgumentTypeError for any other text."""
    try:
        return text if text == LEARNED else float(text)
    except ValueError:
        raise ArgumentTypeError(f"softmax_n needs a number n >= 0, or {LEARNED}, got {text!r}") from None


def arm_name(softmax_n: float | str, control: str | None = None) -> str:
    """softmax0, softmax1, softmax0.5, softmax_learned, or the remedy's name. Different n never share a name."""
    if control:
        return control
    return f"softmax_{LEARNED}" if softmax_n == LEARNED else f"softmax{shortest(softmax_n)}"


def run_name(softmax_n: float | str, seed: int, control: str | None = None) -> str:
    """esperberto-softmax1; with another seed than the published 42, esperberto-softmax1-seed43."""
    return f"esperberto-{arm_name(softmax_n, control)}" + ("" if seed == SEED else f"-seed{seed}")


def arm_order(softmax_n: float | str, control: str | None = None) -> tuple:
    """A sort key for arms: numbers n first, then learned sinks, then remedies."""
    return control or "", softmax_n == LEARNED, 0.0 if softmax_n == LEARNED else softmax_n


# -------------------------------------------------------------------------------------------------------- their models


LARGEST_SIZE = 1 << 20
# How the values of these fields are read, and which are possible.
SIZE = (int, lambda value: 1 <= value <= LARGEST_SIZE)
PROBABILITY = (float, lambda value: 0 <= value < 1)
SMALL_POSITIVE = (float, lambda value: 0 < value <= 1)
# The fields of RobertaConfig that --config_overrides may change. The others are fixed by the data (vocabulary, special
# tokens) or by the comparison (the attention), or the model could not be trained as a masked language model.
OVERRIDES = {
    "num_hidden_layers": SIZE,
    "hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "intermediate_size": SIZE,
    # Two positions are never used, and a sample has at least <s>, one token and </s>.
    "max_position_embeddings": (int, lambda value: 5 <= value <= LARGEST_SIZE),
    "hidden_act": (str, lambda value: value in ACT2FN),
    "hidden_dropout_prob": PROBABILITY,
    "attention_probs_dropout_prob": PROBABILITY,
    "initializer_range": SMALL_POSITIVE,
    "layer_norm_eps": SMALL_POSITIVE,
}


def config_overrides(text: str) -> dict[str, int | float | str]:
    """The changes to the architecture in "num_hidden_layers=4,hidden_size=256", sorted by name.

    Raises:
        ValueError: a field that cannot be changed, an impossible value, or an architecture that cannot be built.
    """
    changes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or name not in OVERRIDES:
            raise ValueError(
                f"--config_overrides takes NAME=VALUE,... with a name out of {', '.join(OVERRIDES)}: {item!r}"
            )
        if name in changes:
            raise ValueError(f"--config_overrides names {name} twice")
        kind, possible = OVERRIDES[name]
        try:
            changes[name] = kind(value)
        except ValueError:
            raise ValueError(f"--config_overrides: {name} needs a number, got {value!r}") from None
        if not possible(changes[name]):
            raise ValueError(f"--config_overrides: {name} cannot be {changes[name]}")
    whole = RobertaConfig(**{**ARCHITECTURE, **changes})
    size, heads = whole.hidden_size, whole.num_attention_heads
    if size % heads:
        raise ValueError(f"--config_overrides: hidden_size {size} is not a multiple of {heads} heads")
    return dict(sorted(changes.items()))


def longest_text(overrides: dict) -> int:
    """The most tokens that a model with these changes to the published architecture can take."""
    return (ARCHITECTURE | overrides)["max_position_embeddings"] - 2


def build_model(
    softmax_n: float | str,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    overrides: dict | None = None,
    control: str | None = None,
) -> PreTrainedModel:
    """RoBERTa with random weights that depend on `seed` alone: all arms of a seed start from the same weights.

    For n = 0 it is transformers' own class, so that a softmax model needs none of our code.

    Args:
        softmax_n: n of the attention, or "learned": an n for each head, which starts at 1 and is trained.
        vocab_size: rows of the embedding.
        tokenizer: its ids of the special tokens go into the configuration.
        seed: of the random weights.
        overrides: changes to the published architecture, from `config_overrides`.
        control: one of REMEDIES instead of softmax_n (controls.py).
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
        return RobertaForMaskedLM(RobertaConfig(softmax_n=0.0, **settings))  # ignored by the stock class
    return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=softmax_n, **settings))


def accept_packed_batches(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model accept packed batches too, in place. A softmax model then uses our attention with n = 0."""
    return keep_masked_positions(apply_softmax_n(model, getattr(model.config, "softmax_n", 0.0)))
