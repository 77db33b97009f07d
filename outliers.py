"""What we measure on activations and attention of a model: outliers, sinks, norms. DEFINITIONS.md defines every figure.

All statistics stream over any amount of text, and padding is left out everywhere. Kurtosis is excess kurtosis
(kurtosis.py): a Gaussian has 0.

Shape legend: B sequences, T tokens, C channels, R real tokens of a batch, H heads, E channels of a head.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from held_out import kept_positions
from hooks import Hooks, modules_by_layer
from kurtosis import Moments, with_float64
from softmax1 import learned_sinks

# --------------------------------------------------------------------------------------------------- classes of tokens

# Outliers sit on the first token and on separators (Bondarenko et al. 2023, Kaul et al. 2025): these have classes.
TOKEN_CLASSES = ("first", "separator", "punctuation", "other")
FIRST, SEPARATOR, PUNCTUATION, OTHER = range(4)


def token_classes(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Class of every token (an index into TOKEN_CLASSES), same shape as `input_ids` (B, T).

    first: position 0 (<s>, [CLS]); separator: any other </s>, [SEP], <s> or [CLS]; punctuation: a token that decodes to
    Unicode punctuation (categories P*) and white space only.
    """
    separators = {tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id}

    def class_of(token_id: int) -> int:
        if token_id in separators:
            return SEPARATOR
        text = tokenizer.decode([token_id]).strip()
        return PUNCTUATION if text and all(unicodedata.category(letter)[0] == "P" for letter in text) else OTHER

    token_ids, index = input_ids.unique(return_inverse=True)
    classes = torch.tensor([class_of(token_id) for token_id in token_ids.tolist()], device=input_ids.device)[index]
    classes[:, 0] = FIRST
    return classes


class BatchStatistics(Hooks):
    """Hooks that sum statistics over the real tokens of batches. Call `batch` before every forward pass."""

    def batch(self, mask: Tensor, classes: Tensor, input_ids: Tensor | None = None) -> None:
        """Announce the batch of the next forward pass.

        Args:
            mask: (B, T), non-zero where a token is real.
            classes: (B, T), of `token_classes`.
            input_ids: (B, T), which massive activations need.
        """
        self._mask = mask.bool()
        self._classes = classes

    @staticmethod
    def add_to(sums: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        """Add every term to the sum of the same name, which begins at 0."""
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term


# --------------------------------------------------------------------------------------------------------- activations


class Place(NamedTuple):
    """A tensor of every layer: the input or the output of a module."""

    module: str  # the module's name after `layer.<i>.`
    side: str  # "input" or "output"
    label: str  # the name of the place in pictures
    same: tuple[str, ...] = ()  # other modules with the same output in eval mode, which the published tables name


# RoBERTa and BERT normalise after adding (post-LN), so the residual stream is the input of a LayerNorm: the output of a
# block plus its input. In eval mode dropout is the identity.
PLACES = {
    "query": Place("attention.self.query", "output", "query"),
    "key": Place("attention.self.key", "output", "key"),
    "value": Place("attention.self.value", "output", "value"),
    "context": Place("attention.output.dense", "input", "attention context"),
    "attention_output": Place(
        "attention.output.dense", "output", "attention output (dense)", ("attention.output.dropout",)
    ),
    "attention_residual": Place("attention.output.LayerNorm", "input", "residual stream behind the attention"),
    "attention_layernorm": Place("attention.output.LayerNorm", "output", "attention LayerNorm", ("attention.output",)),
    "ffn_intermediate": Place("intermediate", "output", "FFN intermediate"),
    "ffn_output": Place("output.dense", "output", "FFN output (dense)"),
    "ffn_residual": Place("output.LayerNorm", "input", "residual stream"),
    "ffn_layernorm": Place("output.LayerNorm", "output", "FFN LayerNorm", ("output",)),
}
FFN = PLACES["ffn_output"].module
# Places of the whole model: input and output of the LayerNorm of the embeddings.
EMBEDDINGS = {"embeddings_sum": "input", "embeddings": "output"}
LOGITS = "logits"

OUTLIER = 6.0  # an entry with |x| >= 6 counts as an outlier (Dettmers et al., "LLM.int8()", NeurIPS 2022)

# Where outliers show: what the FFN adds to the residual stream, the residual stream, and the layer's output.
FFN_PLACES = ("ffn_output", "ffn_residual", "ffn_layernorm")
# Massive activations (Sun et al., "Massive Activations in Large Language Models", 2024): |x| over 100 and over about
# 1,000 times the median |x| of the sequence. Sun et al. measure the output of a layer; we measure all of FFN_PLACES.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
TOP = 8  # so many entries with the largest |x| are kept, with their tokens


class ActivationOutliers(BatchStatistics):
    """Statistics of activations at the named places, real tokens only.

    Sums are float64 on the model's own device; nothing else is kept.

    Args:
        model: a BERT-shaped encoder, with or without a head. Places that it lacks are absent from the result.
        places: names out of PLACES (default: all).
        embeddings: measure the places of EMBEDDINGS too.
        massive: count massive activations at FFN_PLACES; `batch` must then be given the input ids.
    """

    def __init__(
        self, model: nn.Module, places: Iterable[str] = PLACES, embeddings: bool = True, massive: bool = False
    ):
        self._sums: dict[str, _PlaceSums] = {}
        self._massive = massive
        hooks = [
            (module, partial(self._read, f"{layer}.{place}", PLACES[place].side))
            for place in places
            for layer, module in modules_by_layer(model, PLACES[place].module)
        ]
        if embeddings:
            hooks += [
                (module, partial(self._read, place, side))
                for name, module in model.named_modules()
                if name.endswith("embeddings.LayerNorm")
                for place, side in EMBEDDINGS.items()
            ]
        super().__init__(hooks)

    def _read(self, name: str, side: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        values = inputs[0] if side == "input" else output
        if values.shape[:2] == self._mask.shape:
            tokens = self._tokens if self._massive and name.rpartition(".")[2] in FFN_PLACES else None
            self.add(name, values[self._mask], self._sequence, self._real_classes, tokens)

    def batch(self, mask: Tensor, classes: Tensor, input_ids: Tensor | None = None) -> None:
        super().batch(mask, classes)
        self._sequence, positions = self._mask.nonzero().unbind(1)
        self._real_classes = classes[self._mask]
        self._tokens = None if input_ids is None else (input_ids[self._mask], positions)

    @torch.no_grad()
    def add(
        self,
        name: str,
        values: Tensor,
        sequence: Tensor,
        classes: Tensor,
        tokens: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add the values of one place to its sums.

        Args:
            name: name of the place.
            values: (R, C), any float dtype.
            sequence, classes: (R,), the index of the sequence and the class of every token.
            tokens: token ids and positions, (R,) each; without them, massive activations are not counted.
        """
        values, sequence, classes = with_float64(values), with_float64(sequence), with_float64(classes)
        tokens = tokens and (with_float64(tokens[0]), with_float64(tokens[1]))
        if name not in self._sums:
            self._sums[name] = _PlaceSums(values.shape[1], values.device)
        self._sums[name].add(values, sequence, classes, tokens)

    def result(self) -> dict[str, dict]:
        """Statistics by place, `layer.<i>.<place>` or `<place>`; DEFINITIONS.md explains the keys."""
        return {name: sums.result() for name, sums in self._sums.items()}


class _PlaceSums:
    """The sums of one place."""

    def __init__(self, channels: int, device: torch.device):
        kinds = len(TOKEN_CLASSES)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.pooled = Moments(zeros(kinds, 5))
        self.sequence_kurtosis, self.sequences = zeros(()), zeros(())
        self.token_kurtosis, self.tokens = zeros(kinds), zeros(kinds)
        self.norm_sum, self.ratio_sum, self.norms = zeros(()), zeros(()), zeros(())
        self.largest = zeros(kinds)
        self.outliers = zeros(kinds)
        self.channel_squares = zeros(channels)
        self.massive: dict[str, Tensor] = {}
        self.top = zeros(0, 5)  # the largest entries: value, ratio to the median, token id, position, channel

    def add(
        self, values: Tensor, sequence: Tensor, classes: Tensor, tokens: tuple[Tensor, Tensor] | None = None
    ) -> None:
        if not len(values):
            return
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        kinds = len(TOKEN_CLASSES)
        _, sequence = sequence.unique(return_inverse=True)
        sequences = int(sequence.max()) + 1

        by_token = Moments.of_rows(values)
        of_tokens = by_token.excess_kurtosis
        finite = ~of_tokens.isnan()
        self.token_kurtosis.index_add_(0, classes, of_tokens.nan_to_num(0.0))
        self.tokens.index_add_(0, classes, finite.double())
        of_sequences = by_token.merged(sequence, sequences).excess_kurtosis
        self.sequence_kurtosis += of_sequences.nansum()
        self.sequences += (~of_sequences.isnan()).sum()
        self.pooled = self.pooled + by_token.merged(classes, kinds)

        magnitudes = values.abs()
        top = magnitudes.amax(1).double()  # of every token
        self.largest.scatter_reduce_(0, classes, top, "amax")
        self.outliers.index_add_(0, classes, (magnitudes >= OUTLIER).sum(1).double())
        norms = top.new_zeros(sequences).scatter_reduce_(0, sequence, top, "amax")
        self.norm_sum += norms.sum()
        self.norms += sequences
        medians = self._medians(magnitudes, sequence, sequences)
        self.ratio_sum += (norms / medians.double()).sum()
        if tokens is not None:
            self._add_massive(values, medians, sequence, tokens)
        self.channel_squares += magnitudes.square_().double().sum(0)  # faster than sum(0, dtype=torch.float64)

    def _add_massive(self, values: Tensor, medians: Tensor, sequence: Tensor, tokens: tuple[Tensor, Tensor]) -> None:
        magnitudes = values.abs()
        ratios = magnitudes / medians[sequence][:, None]
        large, many = magnitudes > MASSIVE, ratios > MASSIVE_RATIO
        counts = {"count": large & many, "above_100": large, "above_1000_medians": many}
        for name, chosen in counts.items():
            self.massive[name] = self.massive.get(name, 0) + chosen.sum()
        channels = magnitudes.shape[1]
        largest = magnitudes.flatten().topk(min(TOP, magnitudes.numel())).indices
        ids, positions = (of_token[largest // channels] for of_token in tokens)
        columns = values.flatten()[largest], ratios.flatten()[largest], ids, positions, largest % channels
        top = torch.cat([self.top, torch.stack([column.double() for column in columns], 1)])
        self.top = top[top[:, 0].abs().argsort(descending=True, stable=True)[:TOP]]

    @staticmethod
    def _medians(magnitudes: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        """(sequences,) median of |x| of every sequence; the lower one of two where the number of entries is even."""
        lengths = torch.bincount(sequence, minlength=sequences)
        order = torch.argsort(sequence, stable=True)
        return torch.stack([of_sequence.median() for of_sequence in magnitudes[order].split(lengths.tolist())])

    def result(self) -> dict:
        all_classes = self.pooled.pooled()
        n, mean, m2, *_ = all_classes.sums[0].tolist()
        squares = self.channel_squares
        classes = {}
        for i, name in enumerate(TOKEN_CLASSES):
            entries = self.pooled.sums[i, 0].item()
            if entries:
                classes[name] = {
                    "tokens": round(entries / len(squares)),
                    "kurtosis_token": (self.token_kurtosis[i] / self.tokens[i]).item(),
                    "kurtosis_pooled": self.pooled.excess_kurtosis[i].item(),
                    "max_abs": self.largest[i].item(),
                    "outlier_count": round(self.outliers[i].item()),
                    "outlier_share": self.outliers[i].item() / entries,
                }
        return {
            "mean": mean,
            "std": math.sqrt(m2 / n),
            "kurtosis_sequence": (self.sequence_kurtosis / self.sequences).item(),
            "kurtosis_token": (self.token_kurtosis.sum() / self.tokens.sum()).item(),
            "kurtosis_pooled": all_classes.excess_kurtosis[0].item(),
            "inf_norm": (self.norm_sum / self.norms).item(),
            "max_abs": self.largest.max().item(),
            "outlier_count": round(self.outliers.sum().item()),
            "outlier_share": self.outliers.sum().item() / n,
            "largest_channel": int(squares.argmax()),
            "largest_channel_share": (squares.max() / squares.sum()).item(),
            "top1_to_median": (self.ratio_sum / self.norms).item(),
            "classes": classes,
            **self._massive(),
        }

    def _massive(self) -> dict:
        if not self.massive:
            return {}
        where = ("token_id", "position", "channel")
        top = [
            {"value": value, "ratio": ratio, **dict(zip(where, map(int, numbers), strict=True))}
            for value, ratio, *numbers in self.top.tolist()
        ]
        return {"massive": {**{name: int(count) for name, count in self.massive.items()}, "top": top}}


# ----------------------------------------------------------------------------------------------------------- attention

SINK = 0.3  # a token is a sink of a head when it gets more than this of the mean query's attention (Gu et al. 2025)
# Sequences of fewer tokens are counted separately: in a sequence of 3 tokens, uniform attention gives each key 1/3
# under softmax and 1/4 under softmax1, so the bound above would distinguish the functions and not the models.
SHORT = 16
NO_MASS = 1e-12  # if the weights of a query sum to less, it attends to nothing, and they cannot be renormalised
SINK_RATES = tuple(
    f"sink_rate_{kind}{length}"
    for length in ("", "_short")
    for kind in ("first", "any", "first_renormalised", "any_renormalised", "any_or_null")
)
OF_QUERIES = ("mass_first", "mass_separator", "mass_punctuation", "mass_self", "null_mass", "entropy")
# A head is idle if its ordinary queries, on average, give more than this share of their attention to <s>, </s>,
# punctuation and the null slot. Two bounds.
IDLE = (0.5, 0.9)
# A query of a head attends if its null mass is at most this: the same bound for every class of models and every n.
ATTENDING = IDLE[0]


def hides_attention(model: nn.Module) -> bool:
    """Whether the model does not take its attention from transformers' attention interface.

    The attention modules of such a model do not always return one weight for every key (Nystroemformer), or their
    weights are not all that the context is made of (ConvBERT), so its attention is not measured.
    """
    return not getattr(model, "_supports_attention_backend", True)


def self_attentions(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """(`layer.<i>`, its self-attention module) of every layer; nothing of a model that `hides_attention`."""
    return () if hides_attention(model) else modules_by_layer(model, "attention.self")


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the self-attention modules of `model` return their weights, for every n of softmax_n.

    A model that `hides_attention` is not changed.
    """
    if hides_attention(model):
        yield
        return
    before = model.config._attn_implementation
    is_softmax_n = getattr(model.config, "softmax_n", None) is not None and before.startswith("softmax_n")
    model.set_attn_implementation("softmax_n_eager" if is_softmax_n else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sinks_by_layer(model: nn.Module) -> dict[str, list[float]]:
    """{"layer.<i>": log n of each head} of a model with learned sinks; empty for every other model."""
    log_n_by_layer = {}
    for name, log_n in learned_sinks(model).items():
        if match := re.search(r"\b(layer\.\d+)\.", name):
            log_n_by_layer[match[1]] = log_n.tolist()
    return log_n_by_layer


class AttentionSinks(BatchStatistics):
    """Where the attention of every head goes, and how much of it goes nowhere; real queries and keys only.

    The self-attention modules must return their weights (see `eager_attention`).

    Args:
        model: a BERT-shaped encoder. One that `hides_attention` has no layer in the result.
    """

    def __init__(self, model: nn.Module):
        self._sums: dict[str, dict[str, Tensor]] = {}
        super().__init__((module, partial(self._read, layer)) for layer, module in self_attentions(model))

    def _read(self, layer: str, module: nn.Module, inputs: tuple, output: tuple) -> None:
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise ValueError(f"{type(module).__name__} returns no attention weights: use eager_attention")
        self.add(layer, output[1])

    @torch.no_grad()
    def add(self, layer: str, weights: Tensor) -> None:
        """Add the weights (B, H, T, T) of one layer: rows are queries and sum to 1 minus the null mass."""
        weights = with_float64(weights.detach()).float()
        real, classes = with_float64(self._mask), with_float64(self._classes)
        query = real[:, None, :].double()  # (B, 1, T)
        ordinary = query * (classes == OTHER)[:, None, :]
        # The weight of a masked key is 0. The null mass of a softmax is rounding error.
        total = weights.sum(-1, dtype=torch.float64)  # (B, H, T)
        null = (1 - total).clamp_min(0)
        mass = {
            f"mass_{kind}": (weights * ((classes == i) & real)[:, None, None, :]).sum(-1, dtype=torch.float64)
            for i, kind in enumerate(TOKEN_CLASSES[:OTHER])
        }
        idle = null + sum(mass.values())
        mass["mass_self"] = weights.diagonal(dim1=-2, dim2=-1).double()
        entropy = torch.special.xlogy(weights, weights).sum(-1, dtype=torch.float64) + torch.special.xlogy(null, null)
        of_queries = {**mass, "null_mass": null, "entropy": -entropy}
        heads = weights.shape[1]
        totals = {
            "queries": query.sum().expand(heads),
            "ordinary": ordinary.sum().expand(heads),
            "idle_mass": (idle * ordinary).sum((0, 2)),
            **{key: (value * query).sum((0, 2)) for key, value in of_queries.items()},
        }
        # Mean attention that every key gets from the real queries of its sequence.
        received = {"": (weights * query[..., None]).sum(2, dtype=torch.float64) / query.sum(-1, keepdim=True)}
        attending = query * (total > NO_MASS)
        shares = weights * (attending / total.clamp_min(NO_MASS))[..., None]
        received["_renormalised"] = shares.sum(2) / attending.sum(-1, keepdim=True).clamp_min(1)
        largest = {f"first{kind}": mean[..., 0] for kind, mean in received.items()}
        largest |= {f"any{kind}": mean.amax(-1) for kind, mean in received.items()}
        largest["any_or_null"] = torch.maximum(largest["any"], (null * query).sum(-1) / query.sum(-1))
        short = real.sum(-1) < SHORT
        for length, chosen in (("", ~short), ("_short", short)):
            totals[f"sequences{length}"] = chosen.sum().double().expand(heads)
            for kind, share in largest.items():
                totals[f"sink_rate_{kind}{length}"] = ((share > SINK) & chosen[:, None]).sum(0).double()
        self.add_to(self._sums.setdefault(layer, {}), totals)

    def result(self) -> dict[str, dict[str, list[float]]]:
        """By layer (`layer.<i>`), a list over its heads for every key; DEFINITIONS.md explains them.

        A sink rate is NaN where there is no sequence of that length.
        """
        counts = dict.fromkeys(OF_QUERIES, "queries") | {"idle_mass": "ordinary"}
        counts |= {rate: "sequences_short" if rate.endswith("_short") else "sequences" for rate in SINK_RATES}
        return {
            layer: {key: (sums[key] / sums[count]).tolist() for key, count in counts.items()}
            for layer, sums in self._sums.items()
        }


def uniform_attention(
    lengths: list[int], n: float | list[float], attention_weights: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float | int]:
    """Sink rates and null mass of attention whose weights are all equal, 1 / (n + T), on sequences of these lengths.

    They depend on n by construction, so the figures of a model have to be compared with them.

    Args:
        lengths: number of tokens of each sequence, > 0.
        n: n of softmax_n, >= 0; or a list with the n of every head, over which the mean is taken.
        attention_weights: of a model whose attention is not softmax_n: the function from scores (1, T) to weights.

    Returns:
        {"sequences", "sequences_short" (fewer than SHORT tokens), "null_mass" and every key of SINK_RATES}; NaN where
        there is no sequence of that length.
    """
    if isinstance(n, list):
        heads = [uniform_attention(lengths, n_of_head) for n_of_head in n]
        means = {key: sum(head[key] for head in heads) / len(heads) for key in heads[0]}
        return means | {key: heads[0][key] for key in ("sequences", "sequences_short")}  # the same for every head
    length = torch.tensor(lengths, dtype=torch.float64)
    weight = 1 / (n + length)
    if attention_weights is not None:
        scores = [torch.zeros(1, int(tokens), dtype=torch.float64) for tokens in length]
        weight = torch.stack([attention_weights(of_query)[0, 0] for of_query in scores])
    null = 1 - length * weight
    rates: dict[str, float | int] = {"null_mass": ((null * length).sum() / length.sum()).item()}
    renormalised = torch.where(weight > 0, 1 / length, 0)  # a query that attends to nothing has no sink
    largest = {"first": weight, "any": weight, "first_renormalised": renormalised, "any_renormalised": renormalised}
    for suffix, chosen in (("", length >= SHORT), ("_short", length < SHORT)):
        rates[f"sequences{suffix}"] = int(chosen.sum())
        for kind, share in {**largest, "any_or_null": torch.maximum(weight, null)}.items():
            rates[f"sink_rate_{kind}{suffix}"] = (share[chosen] > SINK).double().mean().item()
    return rates


# One number for each layer: kurtosis of the context of active heads, of heads that attend, of queries that attend.
CONTEXTS = ("context_kurtosis_active", "context_kurtosis_attending_heads", "context_kurtosis_attending")
NEAR_ZERO = 0.01  # times the root mean square of the layer's context in a sequence


class HeadVectors(BatchStatistics):
    """Norms of the keys and values, range of the logits and context of every head, real tokens only.

    The self-attention modules must return their weights (see `eager_attention`). The moments of the context are kept
    for every sequence and head (40 bytes each), because it is not known before the last batch which heads are idle.
    For every sequence, the moments over the queries that attend (ATTENDING), in all heads, are kept too.

    Args:
        model: a BERT-shaped encoder. A layer without query, key and value projections is absent from the result, and
            so is every layer of a model that `hides_attention`.
    """

    def __init__(self, model: nn.Module):
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._moments: dict[str, list[Tensor]] = {}  # by layer: (B, H, 5) of every batch
        self._attending: dict[str, list[Tensor]] = {}  # by layer: (B, 5) of every batch
        self._vectors: dict[str, Tensor] = {}
        hooks = []
        for layer, module in self_attentions(model):
            projections = {part: getattr(module, part, None) for part in ("query", "key", "value")}
            if None not in projections.values():
                hooks += [(projection, partial(self._keep, part)) for part, projection in projections.items()]
                hooks.append((module, partial(self._read, layer)))
        super().__init__(hooks)

    def _keep(self, part: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._vectors[part] = output

    def _read(self, layer: str, module: nn.Module, inputs: tuple, output: tuple) -> None:
        self.add(layer, output[1], **self._vectors, context=output[0])
        self._vectors = {}

    @torch.no_grad()
    def add(self, layer: str, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor) -> None:
        """Add one layer: weights (B, H, T, T), the others (B, T, C) with the heads side by side in C."""
        heads, real, classes = weights.shape[1], with_float64(self._mask), with_float64(self._classes)
        weights = with_float64(weights)
        query, key, value, context = (
            with_float64(vectors.detach()).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for vectors in (query, key, value, context)
        )  # (B, H, T, E)
        queries = real[:, None].double()  # (B, 1, T)
        kinds = nn.functional.one_hot(classes, len(TOKEN_CLASSES)).double() * real[..., None]  # (B, T, 4)
        norms = {"key": key.norm(dim=-1).double(), "value": value.norm(dim=-1).double()}
        contributed = weights.double() @ (norms["value"][..., None] * kinds[:, None])  # (B, H, T, 4)
        logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        high = logits.masked_fill(~real[:, None, None], -math.inf).amax(-1)
        low = logits.masked_fill(~real[:, None, None], math.inf).amin(-1)
        squares = (context.square().double() * queries[..., None]).sum((1, 2, 3))
        size = squares.new_tensor(float(heads * context.shape[-1])) * queries.sum((1, 2))
        zero = context.abs().double() <= NEAR_ZERO * (squares / size).sqrt()[:, None, None, None]
        near_zero = (zero.double().mean(-1) * queries).sum(-1) / queries.sum(-1)  # (B, H)
        attends = (1 - weights.sum(-1, dtype=torch.float64) <= ATTENDING) & real[:, None]  # (B, H, T)
        totals = {
            "tokens": kinds.sum((0, 1)).expand(heads, -1),
            "queries": queries.sum().expand(heads),
            "sequences": queries.new_tensor(float(len(real))).expand(heads),
            "contribution": (contributed * queries[..., None]).sum((0, 2)),
            "logit_range": ((high - low) * queries).sum((0, 2)),
            "context_near_zero": near_zero.sum(0),
            "attending_share": attends.double().sum((0, 2)),
            **{f"{part}_norm": torch.einsum("bht,btk->hk", norm, kinds) for part, norm in norms.items()},
        }
        largest = torch.maximum(high.abs(), low.abs()).masked_fill(~real[:, None], 0).amax((0, 2)).double()
        sums = self._sums.setdefault(layer, {"logit_max": torch.zeros_like(largest)})
        sums["logit_max"] = torch.maximum(sums["logit_max"], largest)
        self.add_to(sums, totals)
        rows = Moments.of_rows(context.transpose(1, 2)[real].flatten(0, 1))  # tokens x heads
        sequence = real.nonzero()[:, :1]
        group = sequence * heads + torch.arange(heads, device=real.device)
        moments = rows.merged(group.flatten(), len(real) * heads).sums
        self._moments.setdefault(layer, []).append(moments.view(-1, heads, 5))
        group = torch.where(attends.transpose(1, 2)[real], sequence, len(real))  # the last group is dropped
        moments = rows.merged(group.flatten(), len(real) + 1).sums
        self._attending.setdefault(layer, []).append(moments[:-1])

    def result(self, attention: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
        """By layer, a list over its heads for every key, and one number for each key of CONTEXTS.

        Args:
            attention: the result of AttentionSinks, whose idle mass and null mass say which heads count.
        """
        by_layer = {}
        for layer, sums in self._sums.items():
            by_layer[layer] = of_layer = {"logit_max": sums["logit_max"].tolist()}
            counts = {"logit_range": "queries", "context_near_zero": "sequences", "attending_share": "queries"}
            of_layer |= {key: (sums[key] / sums[count]).tolist() for key, count in counts.items()}
            for i, kind in enumerate(TOKEN_CLASSES):
                for part in ("key", "value"):
                    of_layer[f"{part}_norm_{kind}"] = (sums[f"{part}_norm"][:, i] / sums["tokens"][:, i]).tolist()
                of_layer[f"contribution_{kind}"] = (sums["contribution"][:, i] / sums["queries"]).tolist()
            moments = torch.cat(self._moments[layer])  # (sequences, H, 5)
            sequences, heads, _ = moments.shape
            kurtosis = Moments(moments.flatten(0, 1)).excess_kurtosis.view(sequences, heads)
            of_layer["context_kurtosis"] = kurtosis.nanmean(0).tolist()
            for key, mass, bound in (("active", "idle_mass", IDLE[0]), ("attending_heads", "null_mass", ATTENDING)):
                chosen = torch.tensor(attention[layer][mass], dtype=torch.float64, device=moments.device) <= bound
                group = torch.arange(sequences, device=moments.device).repeat_interleave(int(chosen.sum()))
                merged = Moments(moments[:, chosen].flatten(0, 1)).merged(group, sequences)
                of_layer[f"context_kurtosis_{key}"] = merged.excess_kurtosis.nanmean().item()
            attending = Moments(torch.cat(self._attending[layer]))
            of_layer["context_kurtosis_attending"] = attending.excess_kurtosis.nanmean().item()
        return by_layer


# ------------------------------------------------------------------------------------------- the whole model, on texts

LOGIT_STRIDE = 8  # logits are measured at every 8th real token: a token has 70 times as many logits as channels


def watched(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    *statistics: BatchStatistics,
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Each batch on the model's device, with its mask and its token classes (B, T), for the caller to run.

    Until the last batch has run, the hooks of the statistics are in the model and its attention is `eager_attention`.
    """
    with ExitStack() as contexts:
        contexts.enter_context(eager_attention(model))
        for statistic in statistics:
            contexts.enter_context(statistic)
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = batch["attention_mask"].bool()
            classes = token_classes(batch["input_ids"], tokenizer)
            for statistic in statistics:
                statistic.batch(mask, classes, batch["input_ids"])
            yield batch, mask, classes


@torch.inference_mode()
def measure_model(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, dict], dict[str, dict], list[int]]:
    """ActivationOutliers, AttentionSinks and HeadVectors of a masked-LM in eval mode.

    Args:
        model: a BERT-shaped masked-LM, on any device.
        batches: padded texts: input_ids and attention_mask (B, T).
        tokenizer: the tokenizer that made them.

    Returns:
        (statistics by place, attention by layer, number of tokens of every sequence). Where sinks are learned, the
        attention has "log_n" of every head too.
    """
    model.eval()
    outliers, sinks, vectors = ActivationOutliers(model, massive=True), AttentionSinks(model), HeadVectors(model)
    lengths: list[int] = []
    for batch, mask, classes in watched(model, batches, tokenizer, outliers, sinks, vectors):
        # Tokens are counted over all batches, so that the choice does not depend on the batch size.
        count = torch.arange(int(mask.sum()), device=mask.device) + sum(lengths)
        chosen = mask.clone()
        chosen[mask] = count % LOGIT_STRIDE == 0
        with kept_positions(model, chosen):
            logits = model(**batch).logits[0]
        outliers.add(LOGITS, logits, chosen.nonzero()[:, 0], classes[chosen])
        lengths += mask.sum(1).tolist()
    places, attention = outliers.result(), sinks.result()
    for place in places.values():
        for entry in place.get("massive", {}).get("top", []):
            entry["token"] = tokenizer.decode([entry.pop("token_id")])
    for layer, of_layer in vectors.result(attention).items():
        attention[layer] |= of_layer
    for layer, log_n in sinks_by_layer(model).items():
        attention[layer]["log_n"] = log_n
    return places, attention, lengths


# ----------------------------------------------------------------------------------------------------------- emergence


class Emergence:
    """A few numbers of a model in training, on a few fixed held-out texts, which show when outliers grow.

    The texts are measured as in the analysis of the final model: unmasked, in eval mode, without padding. A call leaves
    the mode, attention and hooks of the model and the state of the random numbers as they were.

    Args:
        batches: `held_out.padded_batches` of a few dozen texts: input_ids and attention_mask (B, T).
        tokenizer: the tokenizer that made them.
    """

    STATISTICS = ("kurtosis_sequence", "inf_norm", "outlier_share")
    ATTENTION = ("null_mass", "mass_first", "idle_mass", *SINK_RATES)

    def __init__(self, batches: list[dict[str, Tensor]], tokenizer: PreTrainedTokenizerBase):
        self.batches = batches
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """{"layer.<i>.<place>.<statistic>" or "layer.<i>.attention.<statistic>": value}; attention: mean over heads."""
        training = model.training
        model.eval()
        outliers, sinks = ActivationOutliers(model, FFN_PLACES, embeddings=False), AttentionSinks(model)
        for batch, *_ in watched(model, self.batches, self.tokenizer, outliers, sinks):
            model.base_model(**batch)
        model.train(training)
        numbers = {
            f"{place}.{statistic}": values[statistic]
            for place, values in outliers.result().items()
            for statistic in self.STATISTICS
        }
        for layer, values in sinks.result().items():
            for statistic in self.ATTENTION:
                numbers[f"{layer}.attention.{statistic}"] = sum(values[statistic]) / len(values[statistic])
        for layer, log_n in sinks_by_layer(model).items():
            numbers[f"{layer}.attention.log_n"] = sum(log_n) / len(log_n)
        return numbers
