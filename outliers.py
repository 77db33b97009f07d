"""What we measure on weights, activations and attention: moments, kurtosis, norms, sinks. DEFINITIONS.md has them all.

Excess kurtosis is mean((x - mean)^4) / variance^2 - 3 with the population variance: 0 for a Gaussian, -1.2 for a
uniform distribution, -2 for +-1 with equal odds. Others (Bondarenko et al., "Quantizable Transformers", NeurIPS 2023)
report the full kurtosis, which is 3 higher.

The published experiment took it per sequence: all tokens x all channels of one sample pooled, then averaged over the
samples of every training step, in train mode, padding included. `ActivationKurtosis` does the same from forward hooks;
with a mask, or in packed batches, padding is left out.

    ActivationKurtosis      the published statistic of every module, during training
    ActivationOutliers      all statistics of the named places, streaming over any amount of text, padding left out
    AttentionSinks          where the attention of every head goes, and how much of it goes nowhere
    HeadVectors             norms of keys and values, range of the logits, context of every head
    uniform_attention       what AttentionSinks gives where no key differs from another
    Emergence               a few cheap ones at logging steps
    weight_statistics       every parameter

Shape legend: B sequences, T tokens, C channels, R real tokens of a batch, H heads.
"""

from __future__ import annotations

import math
import re
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from held_out import kept_positions
from packing import IGNORED
from softmax1 import learned_sinks


def with_float64(values: Tensor) -> Tensor:
    """`values` on a device that has float64: Apple's GPUs (MPS) have none, so what lies there goes to the CPU."""
    return values.cpu() if values.device.type == "mps" else values


def excess_kurtosis(values: Tensor) -> Tensor:
    """Excess kurtosis of all entries of `values` pooled. Returns a float64 scalar; NaN where the variance is 0."""
    return sequence_excess_kurtosis(with_float64(values.detach()).double().reshape(1, -1))[0]


def sequence_excess_kurtosis(activations: Tensor, mask: Tensor | None = None) -> Tensor:
    """Excess kurtosis of each sequence, its tokens and channels pooled.

    Args:
        activations: (batch, ...), any float dtype; half precision is widened to float32, which x^4 needs.
        mask: (batch, tokens), non-zero where a token is real; `activations` is then (batch, tokens, ...).

    Returns:
        (batch,) in float32 (float64 for float64 input). NaN where a sequence has no spread or no real token.
    """
    dtype = torch.promote_types(activations.dtype, torch.float32)
    values = activations.detach().flatten(1).to(dtype)
    if mask is None:
        count = values.shape[1]
        # Two passes (mean first) because float32 power sums cancel where the mean is large; squaring in place keeps
        # the extra memory at one copy of the activation.
        mean = values.mean(1)
        squares = (values - mean[:, None]).square_()
    else:
        tokens = mask.to(dtype).reshape(*mask.shape, *[1] * (activations.dim() - 2))
        weights = tokens.expand_as(activations).flatten(1)
        count = weights.sum(1)
        mean = (values * weights).sum(1) / count
        squares = (values - mean[:, None]).mul_(weights).square_()
    variance = _beyond_rounding(squares.sum(1) / count, mean, dtype)
    fourth = squares.square_().sum(1) / count
    return fourth / variance.square() - 3


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters but learned sinks, which are no weights: a number a head, that may be -inf, never quantized."""
    sinks = learned_sinks(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in sinks}


def weight_excess_kurtosis(model: nn.Module) -> dict[str, float]:
    """Excess kurtosis over all entries of every weight, by parameter name (float64 arithmetic)."""
    return {name: excess_kurtosis(parameter).item() for name, parameter in weights_of(model).items()}


def sinks_by_layer(model: nn.Module) -> dict[str, list[float]]:
    """{"layer.<i>": log n of each head} of a model with learned sinks; empty for every other."""
    found = {}
    for name, log_n in learned_sinks(model).items():
        if match := re.search(r"\b(layer\.\d+)\.", name):
            found[match[1]] = log_n.tolist()
    return found


def _beyond_rounding(variance: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN where entries that are all equal leave a variance of rounding error about their mean (as scipy has it)."""
    return torch.where(variance > (10 * torch.finfo(dtype).eps * mean) ** 2, variance, torch.nan)


class ActivationKurtosis:
    """Running mean, over sequences, of the excess kurtosis of every module's output, without waiting for the device.

    While it is entered (`with kurtosis: model(**batch)`) hooks on every submodule of `model` add up, on the model's own
    device; only `result()` and `state()` wait for it. Outside, the model runs as if there were no hooks.
    Where a module returns a tuple or a ModelOutput its first tensor counts.

    Args:
        model: the module to watch.

    Attributes:
        mask: (batch, tokens) or None; set it before a forward pass to count real tokens only. Modules whose output
            is not (batch, tokens, ...), BERT's one row of positions for example, are then left out.
        packed: a packed batch (packing.py) or None; set it before entering, for one forward pass. A sequence is then
            its tokens in the row, and in the head those of them that are masked.
    """

    def __init__(self, model: nn.Module):
        self.mask: Tensor | None = None
        self.packed: dict | None = None
        self._model = model
        self._handles: list = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._last: tuple = (lambda: None, None)  # weak reference to the last activations, what we took of them
        self._moments: dict[str, Tensor] = {}  # of the tokens of a packed batch

    def __enter__(self) -> ActivationKurtosis:
        self._handles = [
            # First of all hooks: one of packing.py changes what the encoder hands to the head.
            module.register_forward_hook(self._hook(name), prepend=True)
            for name, module in self._model.named_modules()
            if name
        ]
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.packed is not None:
            self._merge_packed()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs, output) -> None:
            activations = output if isinstance(output, Tensor) else output[0]
            if self.mask is not None and activations.shape[:2] != self.mask.shape:
                return
            # A module often returns the very tensor that its last child did (LayerNorm, then the block around it).
            if activations is not self._last[0]():
                with torch.no_grad():
                    if self.packed is None:
                        taken = sequence_excess_kurtosis(activations, self.mask)
                    else:
                        taken = Moments.of_rows(activations.detach()[0]).sums
                self._last = (weakref.ref(activations), taken)
            if self.packed is None:
                self._add(name, with_float64(self._last[1]).sum(dtype=torch.float64), self._last[1].numel())
            else:
                self._moments[name] = self._last[1]

        return add

    @torch.no_grad()
    def _merge_packed(self) -> None:
        """Merge tokens into sequences, in a few operations for all modules together."""
        bounds, positions = self.packed["cu_seq_lens_q"], self.packed["masked_positions"]
        sequences = self.packed["sequences"]
        tokens = torch.arange(self.packed["input_ids"].shape[1], device=positions.device)
        # Sequence s holds the tokens from bounds[s] to bounds[s + 1]. What fills a row up comes behind the last one.
        sequence = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(sequences)
        masked = torch.where(self.packed["labels"][0] == IGNORED, sequences, sequence[positions])
        groups = sequences + 1
        for rows in (sequence, masked):
            names = [name for name, moments in self._moments.items() if len(moments) == len(rows)]
            if names:
                tokens = Moments(torch.cat([self._moments[name] for name in names]))
                group = torch.cat([module * groups + rows for module in range(len(names))])
                kurtosis = tokens.merged(group, len(names) * groups).excess_kurtosis.view(-1, groups)[:, :-1]
                present = torch.zeros(groups, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)[:-1]
                present = present.to(kurtosis.device)
                for name, total in zip(names, kurtosis.where(present, 0).sum(1), strict=True):
                    self._add(name, total, present.sum())
        self._moments = {}

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def result(self) -> dict[str, float]:
        """Mean excess kurtosis by module name, over all processes. Modules that never ran are absent."""
        return {name: total / count for name, (total, count) in self.state().items()}

    def state(self) -> dict[str, list]:
        """{module name: [sum, count]} over all processes, for a checkpoint. Every process has to call it."""
        state = {name: [float(total), int(self._counts[name])] for name, total in self._sums.items()}
        if not torch.distributed.is_initialized():
            return state
        states = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
        return {name: [sum(other[name][i] for other in states) for i in (0, 1)] for name in state}

    def load_state(self, state: dict[str, list]) -> None:
        """Go on from what `state()` gave; in one process of several, or it counts several times."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


# -------------------------------------------------------------------------------------- moments that add up exactly


class Moments:
    """Count, mean and central power sums of groups of numbers: a (groups, 5) float64 tensor [n, mean, M2, M3, M4].

    M_k = sum (x - mean)^k. On the device of the numbers where it has float64, else on the CPU. Two groups merge without
    cancellation, however far their means lie from 0 (Pebay, "Formulas
    for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments", 2008), so any
    amount of text streams through.
    """

    def __init__(self, sums: Tensor):
        self.sums = sums

    @classmethod
    def of_rows(cls, values: Tensor) -> Moments:
        """One group a row of `values` (rows, entries). Deviations in float32 (float64 for float64), sums in float64."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        mean = values.mean(1, keepdim=True)
        deviations = values - mean
        squares = deviations.square()
        # In place and in this order: what this costs is memory traffic.
        sums = (
            squares.sum(1),
            deviations.mul_(squares).sum(1),
            squares.square_().sum(1),
        )
        mean, *sums = (with_float64(total).double() for total in (mean[:, 0], *sums))
        return cls(torch.stack([torch.full_like(mean, values.shape[1]), mean, *sums], 1))

    def merged(self, group: Tensor, groups: int) -> Moments:
        """Merge the rows into `groups` groups; `group` (rows,) says which goes where. Empty groups stay at n = 0."""
        group = group.to(self.sums.device)
        n, mean, m2, m3, m4 = self.sums.unbind(1)

        def total(terms: Tensor) -> Tensor:
            return terms.new_zeros(groups).index_add_(0, group, terms)

        count = total(n)
        centre = total(n * mean) / count.clamp_min(1)
        d = mean - centre[group]
        return Moments(
            torch.stack(
                [
                    count,
                    centre,
                    total(m2 + n * d**2),
                    total(m3 + 3 * d * m2 + n * d**3),
                    total(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4),
                ],
                1,
            )
        )

    def __add__(self, other: Moments) -> Moments:
        groups = torch.arange(len(self.sums), device=self.sums.device).repeat(2)
        return Moments(torch.cat([self.sums, other.sums])).merged(groups, len(self.sums))

    def pooled(self) -> Moments:
        """All groups merged into one."""
        return self.merged(torch.zeros(len(self.sums), dtype=torch.long, device=self.sums.device), 1)

    @property
    def excess_kurtosis(self) -> Tensor:
        """(groups,) in float64; NaN where a group is empty or has no spread beyond float32 rounding of its mean."""
        n, mean, m2, _, m4 = self.sums.unbind(1)
        spread = m2 > n * (10 * torch.finfo(torch.float32).eps * mean) ** 2
        return torch.where(spread, n * m4 / m2.square() - 3, torch.nan)


# ---------------------------------------------------------------------------------------------------- kinds of tokens

# Outliers sit on the first token and on separators (Bondarenko et al. 2023, Kaul et al. 2025): they are kept apart.
TOKEN_CLASSES = ("first", "separator", "punctuation", "other")
FIRST, SEPARATOR, PUNCTUATION, OTHER = range(4)


def token_classes(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Class of every token (an index into TOKEN_CLASSES), same shape as `input_ids` (B, T).

    first: position 0 (<s>, [CLS]); separator: any other </s>, [SEP], <s> or [CLS]; punctuation: what decodes to nothing
    but Unicode punctuation (categories P*) and white space.
    """
    separators = {tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id}
    ids = input_ids.unique().tolist()
    kinds = {}
    for i in ids:
        text = tokenizer.decode([i]).strip()
        if i in separators:
            kinds[i] = SEPARATOR
        elif text and all(unicodedata.category(character)[0] == "P" for character in text):
            kinds[i] = PUNCTUATION
        else:
            kinds[i] = OTHER
    table = torch.tensor([kinds.get(i, OTHER) for i in range(max(ids) + 1)], device=input_ids.device)
    classes = table[input_ids]
    classes[:, 0] = FIRST
    return classes


def _positions_only(mask: Tensor) -> Tensor:
    classes = torch.full_like(mask, OTHER, dtype=torch.long)
    classes[:, 0] = FIRST
    return classes


# --------------------------------------------------------------------------------------------------------- activations

# Places of every layer: name behind `layer.<i>.`, and whether its input or its output counts. RoBERTa and BERT
# normalise after adding (post-LN), so the residual stream is what enters a LayerNorm: a block's output plus its input.
PLACES = {
    "query": ("attention.self.query", "output"),
    "key": ("attention.self.key", "output"),
    "value": ("attention.self.value", "output"),
    "context": ("attention.output.dense", "input"),
    "attention_output": ("attention.output.dense", "output"),
    "attention_residual": ("attention.output.LayerNorm", "input"),
    "attention_layernorm": ("attention.output.LayerNorm", "output"),
    "ffn_intermediate": ("intermediate", "output"),
    "ffn_output": ("output.dense", "output"),
    "ffn_residual": ("output.LayerNorm", "input"),
    "ffn_layernorm": ("output.LayerNorm", "output"),
}
# Once a model: what enters and what leaves the LayerNorm of the embeddings.
EMBEDDINGS = {"embeddings_sum": "input", "embeddings": "output"}
LOGITS = "logits"

OUTLIER = 6.0  # |x| at or above it counts as an outlier (Dettmers et al., "LLM.int8()", NeurIPS 2022)

# Massive activations (Sun et al., "Massive Activations in Large Language Models", 2024): |x| over 100 and about 1,000
# times the median |x| of the sequence or more. They look at what leaves a layer; so do we, and at what goes into it.
MASSIVE_PLACES = ("ffn_output", "ffn_residual", "ffn_layernorm")
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
TOP = 8  # of the largest |x| are kept with their token


class ActivationOutliers:
    """Streaming statistics of activations at the named places, real tokens only.

    Hooks the places; before every forward pass call `batch`. Sums are float64 on the model's own device; nothing but
    them is held. Use as a context manager or call `remove()`.

    Args:
        model: a BERT-shaped encoder, with or without a head. Places it lacks are absent from the result.
        places: names out of PLACES (default: all).
        embeddings: watch the embeddings too.
    """

    def __init__(self, model: nn.Module, places: Iterable[str] = PLACES, embeddings: bool = True):
        self._sums: dict[str, _Place] = {}
        self._mask: Tensor | None = None
        self._sequence: Tensor | None = None
        self._classes: Tensor | None = None
        self._tokens: tuple[Tensor, Tensor] | None = None
        self._handles = []
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if match := re.search(r"\blayer\.(\d+)\.(.+)$", name):
                for place in places:
                    suffix, side = PLACES[place]
                    if match[2] == suffix:
                        self._hook(module, side, f"layer.{match[1]}.{place}")
            elif embeddings and name.endswith("embeddings.LayerNorm"):
                for place, side in EMBEDDINGS.items():
                    self._hook(module, side, place)

    def _hook(self, module: nn.Module, side: str, name: str) -> None:
        def add(module: nn.Module, inputs, output) -> None:
            values = inputs[0] if side == "input" else output
            if self._mask is not None and values.shape[:2] == self._mask.shape:
                tokens = self._tokens if name.rpartition(".")[2] in MASSIVE_PLACES else None
                self.add(name, values[self._mask], self._sequence, self._classes, tokens)

        self._handles.append(module.register_forward_hook(add))

    def batch(self, mask: Tensor | None, classes: Tensor | None = None, input_ids: Tensor | None = None) -> None:
        """What the next forward pass holds.

        Args:
            mask: (B, T), non-zero where a token is real; None switches the hooks off.
            classes: (B, T), of `token_classes`; None knows the first token from the others only.
            input_ids: (B, T), for the tokens of massive activations; None leaves these out.
        """
        self._mask = None if mask is None else mask.bool()
        if mask is not None:
            self._sequence, positions = self._mask.nonzero().unbind(1)
            self._classes = (_positions_only(mask) if classes is None else classes)[self._mask]
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
        """Count `values` (R, C) in at a place.

        Args:
            name: of the place.
            values: (R, C), any float dtype.
            sequence, classes: (R,), whose tokens the rows are and of which class.
            tokens: (R,) each, token ids and positions; None counts no massive activations.
        """
        values, sequence, classes = with_float64(values), with_float64(sequence), with_float64(classes)
        tokens = tokens and (with_float64(tokens[0]), with_float64(tokens[1]))
        if name not in self._sums:
            self._sums[name] = _Place(values.shape[1], values.device)
        self._sums[name].add(values, sequence, classes, tokens)

    def result(self) -> dict[str, dict]:
        """Statistics by place, `layer.<i>.<place>` or `<place>`; DEFINITIONS.md explains the keys."""
        return {name: place.result() for name, place in self._sums.items()}

    def remove(self) -> None:
        """Take the hooks out of the model. The sums stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ActivationOutliers:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()


class _Place:
    """The sums of one place."""

    def __init__(self, channels: int, device: torch.device):
        kinds = len(TOKEN_CLASSES)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        self.pooled = Moments(zeros(kinds, 5))
        self.sequence_kurtosis, self.sequences = zeros(()), zeros(())
        self.token_kurtosis, self.tokens = zeros(kinds), zeros(kinds)
        self.norm_sum, self.ratio_sum, self.norms = zeros(()), zeros(()), zeros(())
        self.largest = zeros(kinds)
        self.outliers = zeros(kinds)
        self.channel_squares = zeros(channels)
        self.massive: dict[str, Tensor] = {}
        self.top = zeros(0, 5)  # the largest: value, ratio to the median, token id, position, channel

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
        found = magnitudes.flatten().topk(min(TOP, magnitudes.numel())).indices
        row = found // channels
        ids, positions = (one[row].double() for one in tokens)
        new = [
            values.flatten()[found].double(),
            ratios.flatten()[found].double(),
            ids,
            positions,
            (found % channels).double(),
        ]
        top = torch.cat([self.top, torch.stack(new, 1)])
        self.top = top[top[:, 0].abs().argsort(descending=True, stable=True)[:TOP]]

    @staticmethod
    def _medians(magnitudes: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        """(sequences,) median of |x| of every sequence (of the lower two where their number is even)."""
        lengths = torch.bincount(sequence, minlength=sequences)
        order = torch.argsort(sequence, stable=True)
        return torch.stack([one.median() for one in magnitudes[order].split(lengths.tolist())])

    def result(self) -> dict:
        every = self.pooled.pooled()
        n, mean, m2, *_ = every.sums[0].tolist()
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
            "kurtosis_pooled": every.excess_kurtosis[0].item(),
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
        top = [
            {
                "value": value,
                "ratio": ratio,
                "token_id": int(token_id),
                "position": int(position),
                "channel": int(channel),
            }
            for value, ratio, token_id, position, channel in self.top.tolist()
        ]
        return {"massive": {**{name: int(count) for name, count in self.massive.items()}, "top": top}}


# ----------------------------------------------------------------------------------------------------------- attention

SINK = 0.3  # a token is a sink of a head when it gets more than this of the mean query's attention (Gu et al. 2025)
# Sequences of fewer tokens are kept apart: uniform attention alone gives a key of a sequence of 3 tokens 1/3 under
# softmax and 1/4 under softmax1, so that the bound above would tell the functions apart and not the models.
SHORT = 16
NO_MASS = 1e-12  # a query whose weights sum to less attends to nothing: it has no shares that could be renormalised
SINK_RATES = tuple(
    f"sink_rate_{kind}{length}"
    for length in ("", "_short")
    for kind in ("first", "any", "first_renormalised", "any_renormalised", "any_or_null")
)
# A head does nothing when its ordinary queries give more than this, on average, to <s>, </s>, punctuation and null.
IDLE = (0.5, 0.9)
# A query of a head attends where at most this much of its attention goes nowhere: one bound for every class and n.
ATTENDING = IDLE[0]


def hides_attention(model: nn.Module) -> bool:
    """Whether the model does not take its attention from transformers' attention interface.

    What the attention modules of such a model hand out is not always a weight for every key (Nystroemformer), nor all
    that its context is made of (ConvBERT), so its attention is not measured.
    """
    return not getattr(model, "_supports_attention_backend", True)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` materialises its attention weights, whichever softmax_n it attends with.

    A model that `hides_attention` stays as it is.
    """
    if hides_attention(model):
        yield
        return
    before = model.config._attn_implementation
    ours = getattr(model.config, "softmax_n", None) is not None and before.startswith("softmax_n")
    model.set_attn_implementation("softmax_n_eager" if ours else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class AttentionSinks:
    """Streaming statistics of the attention weights of every head, real queries and keys only.

    Hooks the self-attention modules, which must hand out their weights (see `eager_attention`); before every forward
    pass call `batch`. Use as a context manager or call `remove()`.

    Args:
        model: a BERT-shaped encoder. One that `hides_attention` has no layer in the result.
    """

    def __init__(self, model: nn.Module):
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._mask: Tensor | None = None
        self._classes: Tensor | None = None
        self._handles = []
        for name, module in () if hides_attention(model) else model.named_modules():
            if match := re.search(r"\blayer\.(\d+)\.attention\.self$", name):
                self._hook(module, f"layer.{match[1]}")

    def _hook(self, module: nn.Module, name: str) -> None:
        def add(module: nn.Module, inputs, output) -> None:
            if self._mask is None:
                return
            if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
                raise ValueError(f"{type(module).__name__} hands out no attention weights: use eager_attention")
            self.add(name, output[1])

        self._handles.append(module.register_forward_hook(add))

    def batch(self, mask: Tensor | None, classes: Tensor | None = None) -> None:
        """What the next forward pass holds: `mask` and `classes` (B, T) as in ActivationOutliers."""
        self._mask = None if mask is None else with_float64(mask).bool()
        if mask is not None:
            self._classes = with_float64(_positions_only(mask) if classes is None else classes)

    @torch.no_grad()
    def add(self, name: str, weights: Tensor) -> None:
        """Count in the weights (B, H, T, T) of one layer: rows are queries and sum to 1 minus the null mass."""
        weights = with_float64(weights.detach()).float()
        real = self._mask
        query = real[:, None, :].double()  # (B, 1, T)
        ordinary = query * (self._classes == OTHER)[:, None, :]
        # A masked key has weight 0 already; the null mass of a softmax is rounding error.
        null = (1 - weights.sum(-1, dtype=torch.float64)).clamp_min(0)  # (B, H, T)
        to = {
            kind: (weights * ((self._classes == i) & real)[:, None, None, :]).sum(-1, dtype=torch.float64)
            for i, kind in enumerate(TOKEN_CLASSES[:OTHER])
        }
        own = weights.diagonal(dim1=-2, dim2=-1).double()
        entropy = -(
            torch.special.xlogy(weights, weights).sum(-1, dtype=torch.float64) + torch.special.xlogy(null, null)
        )
        nothing = null + sum(to.values())
        # Mean attention that every key gets from the real queries of its sequence.
        received = {"": (weights * query[..., None]).sum(2, dtype=torch.float64) / query.sum(-1, keepdim=True)}
        total = weights.sum(-1, dtype=torch.float64)  # (B, H, T)
        attending = query * (total > NO_MASS)
        nowhere = (null * query).sum(-1) / query.sum(-1)  # (B, H)
        shares = weights * (attending / total.clamp_min(NO_MASS))[..., None]
        received["_renormalised"] = shares.sum(2) / attending.sum(-1, keepdim=True).clamp_min(1)
        new = {
            "queries": query.sum().expand(weights.shape[1]),
            "ordinary": ordinary.sum().expand(weights.shape[1]),
            "null": (null * query).sum((0, 2)),
            "self": (own * query).sum((0, 2)),
            "entropy": (entropy * query).sum((0, 2)),
            "nothing": (nothing * ordinary).sum((0, 2)),
            **{kind: (mass * query).sum((0, 2)) for kind, mass in to.items()},
        }
        short = real.sum(-1) < SHORT
        for length, chosen in (("", ~short), ("_short", short)):
            new[f"sequences{length}"] = chosen.sum().double().expand(weights.shape[1])
            for kind, mean in received.items():
                for which, most in (("first", mean[..., 0]), ("any", mean.amax(-1))):
                    sinks = (most > SINK) & chosen[:, None]
                    new[f"sink_rate_{which}{kind}{length}"] = sinks.sum(0).double()
            most = torch.maximum(received[""].amax(-1), nowhere)
            new[f"sink_rate_any_or_null{length}"] = ((most > SINK) & chosen[:, None]).sum(0).double()
        sums = self._sums.setdefault(name, {key: torch.zeros_like(value) for key, value in new.items()})
        for key, value in new.items():
            sums[key] = sums[key] + value

    def result(self) -> dict[str, dict[str, list[float]]]:
        """By layer (`layer.<i>`), a list over its heads for every key; DEFINITIONS.md explains them.

        A sink rate is NaN where there is no sequence of that length.
        """
        names = {"mass_first": "first", "mass_separator": "separator", "mass_punctuation": "punctuation"}
        names |= {"mass_self": "self", "null_mass": "null", "entropy": "entropy"}
        found = {}
        for layer, sums in self._sums.items():
            found[layer] = {key: (sums[name] / sums["queries"]).tolist() for key, name in names.items()}
            found[layer]["idle_mass"] = (sums["nothing"] / sums["ordinary"]).tolist()
            for key in SINK_RATES:
                sequences = sums["sequences_short" if key.endswith("_short") else "sequences"]
                found[layer][key] = (sums[key] / sequences).tolist()
        return found

    def remove(self) -> None:
        """Take the hooks out of the model. The sums stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> AttentionSinks:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()


def uniform_attention(
    lengths: Iterable[int], n: float | list[float], attention_weights: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float | int]:
    """What attention that tells no key from another gives on sequences of these lengths: every weight 1 / (n + T).

    Sink rates and null mass differ by construction between values of n; this is what a model has to differ from.

    Args:
        lengths: tokens of each sequence, > 0.
        n: of softmax_n, >= 0; or that of every head, over which the mean is taken.
        attention_weights: of a model whose attention is not softmax_n: makes weights of scores (1, T).

    Returns:
        {"sequences", "sequences_short" (fewer than SHORT tokens), "null_mass" and every key of SINK_RATES}; NaN where
        there is no sequence of that length.
    """
    if isinstance(n, list):
        lengths = list(lengths)
        heads = [uniform_attention(lengths, one) for one in n]
        return {key: value if key.startswith("sequences") else _mean(heads, key) for key, value in heads[0].items()}
    length = torch.tensor(list(lengths), dtype=torch.float64)
    key = 1 / (n + length)
    if attention_weights is not None:
        key = torch.stack([attention_weights(torch.zeros(1, int(one), dtype=torch.float64))[0, 0] for one in length])
    null, share = 1 - length * key, 1 / length
    found: dict[str, float | int] = {"null_mass": ((null * length).sum() / length.sum()).item()}
    most = {"": key, "_renormalised": torch.where(key > 0, share, 0)}  # a query without mass has no sink
    for suffix, chosen in (("", length >= SHORT), ("_short", length < SHORT)):
        found[f"sequences{suffix}"] = int(chosen.sum())
        rates = {f"{which}{kind}": mean for kind, mean in most.items() for which in ("first", "any")}
        for kind, mean in {**rates, "any_or_null": torch.maximum(key, null)}.items():
            found[f"sink_rate_{kind}{suffix}"] = (mean[chosen] > SINK).double().mean().item()
    return found


def _mean(heads: list[dict[str, float]], key: str) -> float:
    return sum(head[key] for head in heads) / len(heads)


# One number a layer: kurtosis of the context of heads that do something, of heads that attend, of queries that do.
CONTEXTS = ("context_kurtosis_active", "context_kurtosis_attending_heads", "context_kurtosis_attending")
NEAR_ZERO = 0.01  # of the root mean square of the layer's context in a sequence


class HeadVectors:
    """Streaming statistics of the query, key, value and context vectors of every head, real tokens only.

    Hooks the self-attention modules and their projections, under `eager_attention`; before every forward pass call
    `batch`. Holds the moments of the context of every sequence and head (40 bytes each), because only in the end it is
    known which heads do nothing; and of every sequence those of the queries that attend (ATTENDING), in all heads.
    Use as a context manager or call `remove()`.

    Args:
        model: a BERT-shaped encoder. A layer without query, key and value projections is absent from the result, and
            so is every layer of a model that `hides_attention`.
    """

    def __init__(self, model: nn.Module):
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._moments: dict[str, list[Tensor]] = {}  # by layer: (B, H, 5) of every batch
        self._attending: dict[str, list[Tensor]] = {}  # by layer: (B, 5) of every batch
        self._vectors: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._classes: Tensor | None = None
        self._handles = []
        for name, module in () if hides_attention(model) else model.named_modules():
            parts = [getattr(module, part, None) for part in ("query", "key", "value")]
            if (match := re.search(r"\blayer\.(\d+)\.attention\.self$", name)) and None not in parts:
                for part, projection in zip(("query", "key", "value"), parts, strict=True):
                    self._handles.append(projection.register_forward_hook(self._keep(part)))
                self._handles.append(module.register_forward_hook(self._hook(f"layer.{match[1]}")))

    def _keep(self, part: str):
        def keep(module: nn.Module, inputs, output: Tensor) -> None:
            if self._mask is not None:
                self._vectors[part] = output

        return keep

    def _hook(self, name: str):
        def add(module: nn.Module, inputs, output) -> None:
            if self._mask is not None:
                self.add(name, output[1], **self._vectors, context=output[0])
                self._vectors = {}

        return add

    def batch(self, mask: Tensor | None, classes: Tensor | None = None) -> None:
        """What the next forward pass holds: `mask` and `classes` (B, T) as in ActivationOutliers."""
        self._mask = None if mask is None else with_float64(mask).bool()
        if mask is not None:
            self._classes = with_float64(_positions_only(mask) if classes is None else classes)

    @torch.no_grad()
    def add(self, name: str, weights: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor) -> None:
        """Count in one layer: weights (B, H, T, T), the others (B, T, C) with the heads side by side in C."""
        heads, real = weights.shape[1], self._mask
        weights = with_float64(weights)
        query, key, value, context = (
            with_float64(vectors.detach()).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for vectors in (query, key, value, context)
        )  # (B, H, T, E)
        queries = real[:, None].double()  # (B, 1, T)
        kinds = nn.functional.one_hot(self._classes, len(TOKEN_CLASSES)).double() * real[..., None]  # (B, T, 4)
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
        every = {
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
        sums = self._sums.setdefault(name, {"logit_max": torch.zeros_like(largest)})
        sums["logit_max"] = torch.maximum(sums["logit_max"], largest)
        for what, total in every.items():
            sums[what] = sums[what] + total if what in sums else total
        rows = Moments.of_rows(context.transpose(1, 2)[real].flatten(0, 1))  # tokens x heads
        sequence = real.nonzero()[:, :1]
        group = sequence * heads + torch.arange(heads, device=real.device)
        moments = rows.merged(group.flatten(), len(real) * heads).sums
        self._moments.setdefault(name, []).append(moments.view(-1, heads, 5))
        group = torch.where(attends.transpose(1, 2)[real], sequence, len(real))  # the others: a group that is dropped
        moments = rows.merged(group.flatten(), len(real) + 1).sums
        self._attending.setdefault(name, []).append(moments[:-1])

    def result(self, idle: dict[str, list[float]], null: dict[str, list[float]]) -> dict[str, dict]:
        """By layer, a list over its heads for every key, and one number for each key of CONTEXTS.

        Args:
            idle, null: {layer: idle mass, null mass of its heads}, of AttentionSinks.
        """
        found = {}
        for layer, sums in self._sums.items():
            found[layer] = one = {"logit_max": sums["logit_max"].tolist()}
            one["logit_range"] = (sums["logit_range"] / sums["queries"]).tolist()
            one["context_near_zero"] = (sums["context_near_zero"] / sums["sequences"]).tolist()
            one["attending_share"] = (sums["attending_share"] / sums["queries"]).tolist()
            for i, kind in enumerate(TOKEN_CLASSES):
                for part in ("key", "value"):
                    one[f"{part}_norm_{kind}"] = (sums[f"{part}_norm"][:, i] / sums["tokens"][:, i]).tolist()
                one[f"contribution_{kind}"] = (sums["contribution"][:, i] / sums["queries"]).tolist()
            moments = torch.cat(self._moments[layer])  # (sequences, H, 5)
            sequences, heads, _ = moments.shape
            kurtosis = Moments(moments.flatten(0, 1)).excess_kurtosis.view(sequences, heads)
            one["context_kurtosis"] = kurtosis.nanmean(0).tolist()
            of_heads = (("active", idle, IDLE[0]), ("attending_heads", null, ATTENDING))
            for key, mass, bound in of_heads:
                some = torch.tensor(mass[layer], dtype=torch.float64, device=moments.device) <= bound
                chosen = moments[:, some].flatten(0, 1)
                group = torch.arange(sequences, device=moments.device).repeat_interleave(int(some.sum()))
                merged = Moments(chosen).merged(group, sequences)
                one[f"context_kurtosis_{key}"] = merged.excess_kurtosis.nanmean().item()
            attending = Moments(torch.cat(self._attending[layer]))
            one["context_kurtosis_attending"] = attending.excess_kurtosis.nanmean().item()
        return found

    def remove(self) -> None:
        """Take the hooks out of the model. The sums stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> HeadVectors:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()


# ------------------------------------------------------------------------------------------- the whole model, on texts

LOGIT_STRIDE = 8  # every 8th real token's logits are measured: they are 70 times as many numbers as its hidden state


def watched(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    *statistics: ActivationOutliers | AttentionSinks | HeadVectors,
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Each batch on the model's device with its mask and token classes, once `statistics` have been told of it."""
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        classes = token_classes(batch["input_ids"], tokenizer)
        for one in statistics:
            one.batch(mask, classes)
        yield batch, mask, classes


@torch.inference_mode()
def measure_model(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, dict], dict[str, dict], dict[str, int]]:
    """ActivationOutliers and AttentionSinks of a masked-LM in eval mode.

    Args:
        model: a BERT-shaped masked-LM, on any device.
        batches: what the tokenizer makes of texts: input_ids and attention_mask (B, T), padded.
        tokenizer: the one that made them.

    Returns:
        (statistics by place, attention by layer, {"sequences", "tokens", "lengths": tokens of every sequence}). Where
        sinks are learned, the attention has "log_n" of every head too.
    """
    model.eval()
    seen = {"sequences": 0, "tokens": 0, "lengths": []}
    with (
        eager_attention(model),
        ActivationOutliers(model) as outliers,
        AttentionSinks(model) as sinks,
        HeadVectors(model) as vectors,
    ):
        for batch, mask, classes in watched(model, batches, tokenizer, outliers, sinks, vectors):
            outliers.batch(mask, classes, batch["input_ids"])
            sequence, position = mask.nonzero().unbind(1)
            # Counted over all batches, so that the choice does not depend on how the texts are batched.
            chosen = (torch.arange(len(sequence), device=mask.device) + seen["tokens"]) % LOGIT_STRIDE == 0
            keep = torch.zeros_like(mask)
            keep[sequence[chosen], position[chosen]] = True
            with kept_positions(model, keep):
                logits = model(**batch).logits[0]
            outliers.add(LOGITS, logits, sequence[chosen], classes[keep])
            seen["sequences"] += len(mask)
            seen["tokens"] += len(sequence)
            seen["lengths"] += mask.sum(1).tolist()
    places, attention = outliers.result(), sinks.result()
    for place in places.values():
        for one in place.get("massive", {}).get("top", []):
            one["token"] = tokenizer.decode([one.pop("token_id")])
    masses = [{layer: one[key] for layer, one in attention.items()} for key in ("idle_mass", "null_mass")]
    for layer, found in vectors.result(*masses).items():
        attention[layer] |= found
    for layer, log_n in sinks_by_layer(model).items():
        attention[layer]["log_n"] = log_n
    return places, attention, seen


# ----------------------------------------------------------------------------------------------------------- emergence


class Emergence:
    """A few numbers of a model in training, on a few fixed held-out texts, so that outliers are seen growing.

    The texts are of the kind that the analysis of the final model has, and go the same way: unmasked, eval mode,
    padding left out. Calling it leaves the model as it was: train mode, attention, hooks and random numbers.

    Args:
        batches: of `held_out.padded_batches`: input_ids and attention_mask (B, T). A few dozen texts are enough.
        tokenizer: the one that made them.
    """

    PLACES = ("ffn_output", "ffn_residual", "ffn_layernorm")
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
        with (
            eager_attention(model),
            ActivationOutliers(model, self.PLACES, embeddings=False) as outliers,
            AttentionSinks(model) as sinks,
        ):
            for batch, *_ in watched(model, self.batches, self.tokenizer, outliers, sinks):
                model.base_model(**batch)
        model.train(training)
        found = {
            f"{place}.{statistic}": values[statistic]
            for place, values in outliers.result().items()
            for statistic in self.STATISTICS
        }
        for layer, values in sinks.result().items():
            for statistic in self.ATTENTION:
                found[f"{layer}.attention.{statistic}"] = sum(values[statistic]) / len(values[statistic])
        for layer, log_n in sinks_by_layer(model).items():
            found[f"{layer}.attention.log_n"] = sum(log_n) / len(log_n)
        return found
