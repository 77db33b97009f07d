"""What a trained masked-LM does when one thing about its attention is changed: statistics alone cannot show causes.

Models of all arms and classes get the same interventions: as_softmax0 of softmax0, and as_softmax1 of softmax1, equal
as_trained up to rounding. DEFINITIONS.md defines every intervention and what is measured.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from held_out import masked_loss
from hooks import Hooks
from outliers import SINK, ActivationOutliers, AttentionSinks, hides_attention, self_attentions, watched
from softmax1 import ATTENTION, apply_softmax_n

INTERVENTIONS = {  # with their names in the report
    "as_trained": "as trained",
    "as_softmax0": "attends with n = 0",
    "as_softmax1": "attends with n = 1",
    "without_sink_heads": "without its sink heads",
    "without_random_heads": "without as many other heads",
    "without_first_token": "without the first token",
}
DRAWS = 3  # the number of draws of random heads, over which the mean is taken

Heads = set[tuple[str, int]]  # (layer.<i>, head)


def interventions(
    model: PreTrainedModel, batches: list[dict], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """Measure the model on the same masked text under each intervention. The model is left in eval mode.

    A head is a sink head if, in more than 30 % (SINK) of the sequences, one token or the null slot gets more than 30 %
    of the attention (`sink_rate_any_or_null`). This is the same rule for every n.

    Args:
        model: a BERT-shaped masked-LM.
        batches: of `held_out_batches`.
        tokenizer: the tokenizer that made them.

    Returns:
        {name out of INTERVENTIONS: {"loss", "ffn_output_kurtosis", "residual_inf_norm", "sink_rate_first", "null_mass",
        "heads"}}, as DEFINITIONS.md defines them; NaN where the model has no such place or no such attention.
        Interventions that do not apply are absent; so is as_softmax* of a model that does not take its attention from
        transformers' attention interface, or whose class has an attention of its own.
    """
    model.eval()
    results = {}
    results["as_trained"], attention = _measure(model, batches, tokenizer)
    if not hides_attention(model):
        for n in (0, 1):
            try:
                changed = apply_softmax_n(copy.deepcopy(model), n)
            except ValueError:  # the model has an attention that cannot be changed
                continue
            if changed.config._attn_implementation.startswith(ATTENTION):  # some classes keep an attention of their own
                results[f"as_softmax{n}"], _ = _measure(changed, batches, tokenizer)

    sinks, others = set(), set()
    for layer, of_layer in attention.items():
        for head, rate in enumerate(of_layer["sink_rate_any_or_null"]):
            (sinks if rate > SINK else others).add((layer, head))
    if sinks:
        results["without_sink_heads"] = _without(model, sinks, batches, tokenizer)
    if sinks and len(others) >= len(sinks):
        generator = random.Random(0)
        draws = [set(generator.sample(sorted(others), len(sinks))) for _ in range(DRAWS)]
        measured = [_without(model, heads, batches, tokenizer) for heads in draws]
        means = {key: float(np.mean([of_draw[key] for of_draw in measured])) for key in measured[0]}
        results["without_random_heads"] = {**means, "heads": len(sinks)}

    first_tokens = {token for batch in batches for token in batch["input_ids"][:, 0].tolist()}
    if len(first_tokens) == 1 and first_tokens <= {tokenizer.bos_token_id, tokenizer.cls_token_id}:
        shorter = [{name: tensor[:, 1:] for name, tensor in batch.items()} for batch in batches]
        results["without_first_token"], _ = _measure(model, shorter, tokenizer)
    return {name: {"heads": 0, **results[name]} for name in INTERVENTIONS if name in results}


def _without(
    model: PreTrainedModel, heads: Heads, batches: list[dict], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """The figures of `interventions`, with the context of these heads set to zero."""
    kept = {
        layer: torch.tensor([(layer, head) not in heads for head in range(model.config.num_attention_heads)])
        for layer, _ in self_attentions(model)
    }

    def zero(layer: str, module: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        context = output[0].unflatten(-1, (len(kept[layer]), -1))
        return (context * kept[layer].to(context)[:, None]).flatten(-2), *output[1:]

    with Hooks((module, partial(zero, layer)) for layer, module in self_attentions(model)):
        return {**_measure(model, batches, tokenizer)[0], "heads": len(heads)}


@torch.inference_mode()
def _measure(
    model: PreTrainedModel, batches: Iterable[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """(the figures of `interventions`, statistics of the attention by layer)."""
    outliers = ActivationOutliers(model, ("ffn_output", "ffn_residual"), embeddings=False)
    sinks = AttentionSinks(model)
    loss = masked = 0
    for batch, *_ in watched(model, batches, tokenizer, outliers, sinks):
        nats, masked_tokens = masked_loss(model, batch, "sum")
        loss += nats.item()
        masked += int(masked_tokens.sum())
    places, attention = outliers.result(), sinks.result()

    def by_layer(place: str, statistic: str) -> list[float]:
        return [of_place[statistic] for name, of_place in places.items() if name.endswith(f".{place}")] or [math.nan]

    def mean_of_heads(statistic: str) -> float:
        return float(np.mean([of_layer[statistic] for of_layer in attention.values()] or [math.nan]))

    figures = {
        "loss": loss / masked,
        "ffn_output_kurtosis": float(np.mean(by_layer("ffn_output", "kurtosis_sequence"))),
        "residual_inf_norm": max(by_layer("ffn_residual", "inf_norm")),
        "sink_rate_first": mean_of_heads("sink_rate_first"),
        "null_mass": mean_of_heads("null_mass"),
    }
    return figures, attention
