"""Post-training quantization of a masked-LM, and what it costs in held-out loss. DEFINITIONS.md defines the SCHEMES.

In the four static schemes, weights are symmetric and activations asymmetric (0 is exact), with one range a tensor, and
arithmetic is simulated in float32 ("fake quantization"). This is the setting that outliers break. `w8a8_published`
follows the code that Bondarenko et al. published for "Quantizable Transformers" (NeurIPS 2023; validate_mlm.py and what
it calls): the same tensors are quantized, and their ranges are estimated in the same way and on the same kind of text.
The three other static schemes are ours. DEFINITIONS.md compares both: which tensors are quantized, where their ranges
come from, and on which text they are calibrated.

Every scheme computes through the one attention function of this file, whatever the class of the model: two models that
compute the same function are measured alike (softmax_n with n = 1e-30 and softmax, for example).

The rounding is torch's own fake quantization everywhere. We do not use torchao: it has the last two schemes only, and
where it is installed, transformers imports it into every script, with four warnings each time.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import softmax1
from held_out import per_text_loss, perplexity
from outliers import hides_attention
from softmax1 import apply_softmax_n, log_n_of

# Defaults of the code of Bondarenko et al.: batches of a draw, and the weight of the range so far in a running range.
CALIBRATION_BATCHES = 16
MOMENTUM = 0.9
PUBLISHED_LENGTH = 128  # tokens of a sequence that the published setting calibrates on
DRAWS = 4  # number of draws of calibration texts: w8a8_static is their mean, and their spread is part of its error
PERCENTILE = 0.9999  # of Wu et al. 2020, "Integer Quantization for Deep Learning Inference", who try 0.999 to 0.999999
GROUP_SIZE = 128  # number of 4-bit weights with one scale, as in GPTQ and AWQ
PART_BATCHES = 8  # batches of held-out text, evenly spread, that the damage of one part alone is measured on
RESAMPLES = 2000  # how often texts are drawn for a bootstrap interval

SCHEMES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "w8a8_static": "W8A8, static per tensor",
    "w8a8_percentile": "W8A8, static, percentile ranges",
    "w8a8_mse": "W8A8, static, least-squares ranges",
    "w8a8_published": "W8A8, static, as published",
    "w8a8_dynamic": "W8A8, dynamic per token",
    "w4_weight_only": "W4, weights only",
}
# What ONNX Runtime runs (executed.py); not simulated.
EXECUTED = {
    "float32": "float32, executed",
    "int8_minmax": "INT8, executed, MinMax ranges",
    "int8_percentile": "INT8, executed, percentile ranges",
}
# The name of the attention below in transformers. It begins with softmax_n, because it reads n from the config.
ATTENTION = "softmax_n_fake_quantized"


def int8_weight(weight: Tensor) -> Tensor:
    """`weight` on the grid of symmetric 8-bit integers with one scale, max |w| / 127."""
    return _symmetric(weight.detach().reshape(1, -1), 127).reshape(weight.shape)


def int8_rows(values: Tensor) -> Tensor:
    """`values` on the same grid with one scale for each row (the last dimension)."""
    return _symmetric(values.detach().reshape(-1, values.shape[-1]), 127).reshape(values.shape)


def int4_weight(weight: Tensor) -> Tensor:
    """`weight` (outputs, inputs) on the grid of symmetric 4-bit integers with a scale, max |w| / 7, for each group.

    A group is GROUP_SIZE inputs of a row, or the largest divisor of the inputs below that.
    """
    size = max(divisor for divisor in range(1, GROUP_SIZE + 1) if weight.shape[1] % divisor == 0)
    return _symmetric(weight.detach().reshape(-1, size), 7).reshape(weight.shape)


def _symmetric(rows: Tensor, levels: int) -> Tensor:
    # A row of zeros needs some scale above 0.
    scale = (rows.abs().amax(1).float() / levels).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    return torch.fake_quantize_per_channel_affine(rows.float(), scale, zero, 0, -levels - 1, levels).to(rows.dtype)


def mse_weight(weight: Tensor) -> Tensor:
    """`weight` on the grid of symmetric 8-bit integers with the scale that makes the mean squared error smallest."""
    largest = weight.detach().abs().max().item()
    if not 0 < largest < math.inf:
        return int8_weight(weight)
    scales = largest / 127 * SHRINKAGE
    errors = _rounding_error(_occupied(_histogram(weight)), scales, -128, 127)
    return torch.fake_quantize_per_tensor_affine(weight.detach(), float(scales[errors.argmin()]), 0, -128, 127)


def published_weight(weight: Tensor) -> Tensor:
    """`weight` as Bondarenko et al. round it: `int8_weight`, or 256 levels from 0 upwards if no entry is negative."""
    low, high = (value.item() for value in torch.aminmax(weight.detach()))
    if low < 0 or not 0 < high < math.inf:
        return int8_weight(weight)
    return torch.fake_quantize_per_tensor_affine(weight.detach(), high / 255, 0, 0, 255)


def relative_error(exact: Tensor, rounded: Tensor) -> float:
    """||exact - rounded|| / ||exact||, 0 for a tensor of zeros."""
    norm = exact.detach().double().norm()
    return ((exact.detach().double() - rounded.detach().double()).norm() / norm).item() if norm else 0.0


def rounding_errors(weight: Tensor) -> dict[str, float]:
    """{"int8_error", and for a matrix "int4_error"}: relative errors of the two grids above."""
    errors = {"int8_error": relative_error(weight, int8_weight(weight))}
    return errors | ({"int4_error": relative_error(weight, int4_weight(weight))} if weight.dim() == 2 else {})


# ------------------------------------------------------------------------------------------------- ranges of a tensor
#
# Percentiles and squared errors are computed from a histogram whose bins begin at the bfloat16 numbers: the upper 16
# bits of a float32 number are the number of its bin. So one pass over the values is enough at any scale, and the width
# of a bin is at most 1/128 of the values in it.

FINITE = 0x7F80  # bins of one sign; the bin with this number is infinity
_POSITIVE_EDGES = (np.arange(FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
# Of the bins with finite values, from the lowest upwards: their edges, and their numbers in a histogram.
EDGES = np.concatenate([-_POSITIVE_EDGES[:0:-1], _POSITIVE_EDGES])
NUMBERS = np.concatenate([np.arange(0x8000, 0x8000 + FINITE)[::-1], np.arange(FINITE)])
SHRINKAGE = np.logspace(0, -3, 61)  # factors that the search for the best range tries, in steps of 11 %


class Bins(NamedTuple):
    """The bins of a histogram that hold a value, from the lowest upwards: (bins,) each."""

    left: np.ndarray
    right: np.ndarray
    count: np.ndarray


def _histogram(values: Tensor) -> Tensor:
    """Number of values in each bin (65536,): the positive ones from 0, the negative ones from 0x8000 by magnitude."""
    bits = values.detach().float().flatten().view(torch.int32)
    return torch.bincount((bits >> 16) & 0xFFFF, minlength=1 << 16).cpu()


def _occupied(counts: Tensor) -> Bins:
    ordered = counts.numpy()[NUMBERS]
    occupied = ordered.nonzero()[0]
    return Bins(EDGES[occupied], EDGES[occupied + 1], ordered[occupied].astype(np.float64))


def _percentile(bins: Bins, share: float) -> float:
    """The value below which `share` of the histogram lies, linear inside a bin."""
    left, right, count = bins
    total = count.cumsum()
    i = min(np.searchsorted(total, share * total[-1]), len(count) - 1)
    inside = (share * total[-1] - (total[i] - count[i])) / count[i]
    return float(left[i] + inside * (right[i] - left[i]))


def _rounding_error(bins: Bins, scale: np.ndarray, lowest: np.ndarray | int, highest: np.ndarray | int) -> np.ndarray:
    """Mean squared error (grids,) of rounding a histogram to the integers from `lowest` to `highest` times `scale`.

    Values are assumed to be evenly spread inside a bin, so the mean over a bin is an integral: with k the integer that
    x is rounded to, (x - k scale)^2 has the antiderivative k scale^3 / 12 + (x - k scale)^3 / 3, which is continuous
    where k changes. `scale` is (grids,); `lowest` and `highest` are (grids,), or the same number for all grids.
    """
    scale, lowest, highest = (np.asarray(values)[..., None] for values in (scale, lowest, highest))
    cube = scale * scale * scale / 12

    def integral(x: np.ndarray) -> np.ndarray:
        k = np.rint(x / scale).clip(lowest, highest)
        rest = x - k * scale
        return k * cube + rest * rest * rest / 3  # rest**3 would take ten times as long

    left, right, count = bins
    return (integral(right) - integral(left)) / (right - left) @ count / count.sum()


def _mse_range(bins: Bins, low: float, high: float) -> tuple[float, float]:
    """The range inside (low, high) with the smallest mean squared rounding error.

    Not every pair of ends is tried: first both ends shrink together, then the upper, the lower and the upper one again.
    """
    for ends in ((True, True), (False, True), (True, False), (False, True)):
        lows, highs = (end * SHRINKAGE**shrinks for end, shrinks in zip((low, high), ends, strict=True))
        scale = (highs - lows) / 255
        zero = np.clip(np.rint(-lows / scale), 0, 255)
        best = _rounding_error(bins, scale, -zero, 255 - zero).argmin()
        low, high = float(lows[best]), float(highs[best])
    return low, high


class _Range:
    """One activation tensor: its range is estimated, then it is rounded to 256 levels of that range.

    `low` and `high` are the range in use; None before the calibration.
    """

    def __init__(self, owner: StaticW8A8, part: str, name: str):
        self.owner = owner
        self.part = part
        self.name = name
        self.reset()

    def reset(self) -> None:
        self.low: float | None = None
        self.high: float | None = None
        self._running: tuple[float, float] | None = None
        self._extremes = (math.inf, -math.inf)
        self._counts: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Observe or round `values`, depending on the state of the owner."""
        owner = self.owner
        if owner.observing:
            self._observe(values)
            if not owner.published:
                return values
        if self.part not in owner.active:
            return values
        rounded = self._round(values)
        if owner.levels is not None:
            owner.levels[self.name] = len(torch.unique(rounded))
        return rounded

    def _round(self, values: Tensor) -> Tensor:
        scale = max((self.high - self.low) / 255, torch.finfo(torch.float32).tiny)
        if not math.isfinite(scale):  # the model has diverged
            return values * math.nan
        zero = min(max(round(-self.low / scale), 0), 255)
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)

    def _observe(self, values: Tensor) -> None:
        # A tensor is often the input of several modules in succession: its range and histogram are computed once.
        if self.owner.observed is None or self.owner.observed[0] is not values:
            real = self.owner.real_entries(values)
            entries = (values if real is None else values[real]).detach()
            low, high = (value.item() for value in torch.aminmax(entries))
            counts = _histogram(entries) if self.owner.histograms else None
            # The range must hold 0, which every integer kernel represents exactly.
            self.owner.observed = values, min(low, 0.0), max(high, 0.0), counts
        _, low, high, counts = self.owner.observed
        self._extremes = min(self._extremes[0], low), max(self._extremes[1], high)
        if self._running is not None:
            low = MOMENTUM * self._running[0] + (1 - MOMENTUM) * low
            high = MOMENTUM * self._running[1] + (1 - MOMENTUM) * high
        self._running = self.low, self.high = low, high
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts

    def choose(self, estimator: str) -> None:
        """Use the "minmax", "percentile" or "mse" range."""
        low, high = self._running
        if estimator != "minmax" and 0 < high - low < math.inf:
            if self._counts is None:
                raise ValueError(f"{estimator} ranges need a calibration with histograms")
            bins = _occupied(self._counts)
            if estimator == "mse":
                low, high = _mse_range(bins, *self._extremes)
            else:
                low = min(max(_percentile(bins, 1 - PERCENTILE), self._extremes[0]), 0.0)
                high = max(min(_percentile(bins, PERCENTILE), self._extremes[1]), 0.0)
        self.low, self.high = low, high


# ----------------------------------------------------------------------------------------------- one attention for all


def _measured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention as every scheme computes it; scores and weights are quantized by `module.quantizers`, if it has them.

    The weights are softmax_n of the scores, with the n of the config (0 where it has none) or the learned n of each
    head; or the config has a method attention_weights(scores), which returns them. Scores and weights are float32, as
    in torch's kernels; then the weights are rounded to the dtype of the values. The softmax is taken over one more
    logit, log n, even for n = 0: so two models that compute the same function are rounded alike.

    Args and result as in softmax1.softmax_n_attention_forward; for evaluation only, so `dropout` is not applied.
    """
    log_n = log_n_of(module)
    own_weights = getattr(module.config, "attention_weights", None)
    round_scores, round_weights = getattr(module, "quantizers", None) or (lambda values: values,) * 2
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).transpose(-2, -1)
    scores = round_scores(scores * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    if own_weights:
        weights = own_weights(scores)
    else:
        if isinstance(log_n, Tensor):
            null = log_n.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, null], -1)
        else:
            scores = F.pad(scores, (0, 1), value=log_n)
        weights = torch.softmax(scores, -1)[..., :-1]
    weights = round_weights(weights).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(ATTENTION, _measured_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def measured_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` in eval mode that computes the same function through the attention above.

    A model that does not take its attention from transformers' attention interface keeps its own.
    """
    copied = copy.deepcopy(model).eval()
    if hides_attention(model):
        return copied
    # A stock class attends with softmax, whatever n its config has, unless apply_softmax_n has changed its attention.
    is_softmax_n = str(model.config._attn_implementation).startswith(softmax1.ATTENTION)
    apply_softmax_n(copied, getattr(model.config, "softmax_n", 0.0) if is_softmax_n else 0.0)
    copied.set_attn_implementation(ATTENTION)
    return copied


# ----------------------------------------------------------------------------------------------------- W8A8, static


class UnsetRange(RuntimeError):
    """Activations have no range after calibration, so they would pass through unquantized."""


class StaticW8A8:
    """A copy of a masked-LM with statically quantized weights and activations (see the top of this file).

    Args:
        model: a BERT-shaped masked-LM that takes its attention from transformers' attention interface.
        calibration: batches of `held_out_batches`.
        published: quantize the tensors that Bondarenko et al. quantize, and estimate the ranges as they do.
        histograms: keep histograms of all activations, which percentile and mse ranges need.

    Attributes:
        model: the quantized copy.
        parts: "embeddings", "layer.<i>" and "head", in order; without "head" where that stays in float32.
        ranges: {name of an activation: its range}, with the bounds `low` and `high`.

    Raises:
        ValueError: the model does not use the attention interface.
        UnsetRange: see `calibrate`.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: list[dict], published: bool = False, histograms: bool = False
    ):
        if hides_attention(model):
            raise ValueError(f"the attention of {type(model).__name__} is not from transformers' attention interface")
        self.model = measured_copy(model)
        self.published = published
        self.observing = False
        self.observed: tuple | None = None
        self.levels: dict[str, int] | None = None
        self.active: set[str] = set()
        self.ranges: dict[str, _Range] = {}
        self._mask: Tensor | None = None
        self._weights: list[tuple[str, nn.Module, Tensor]] = []
        self._rounded: list[Tensor] = []
        # The decoder gets a weight of its own, so that it can be quantized without the embeddings.
        decoder = self.model.get_output_embeddings()
        decoder.weight = nn.Parameter(decoder.weight.detach().clone(), requires_grad=False)
        self._attach()
        self.parts = list(dict.fromkeys(part for part, *_ in self._weights))
        self.calibrate(calibration, histograms)

    def calibrate(self, calibration: list[dict], histograms: bool = False) -> None:
        """Estimate all ranges again on these batches, and use the running minimum and maximum.

        Raises:
            UnsetRange: an activation was not seen and would stay unquantized; the message names all of them.
        """
        self.histograms = histograms
        for activation in self.ranges.values():
            activation.reset()
        self._round_weights(published_weight if self.published else int8_weight)
        self._activate(self.parts if self.published else ())
        self.observing = True
        try:
            per_text_loss(self.model, calibration)
        finally:
            self.observing, self.observed = False, None
        unset = [name for name, activation in self.ranges.items() if activation.low is None]
        if unset:
            raise UnsetRange(
                f"{len(unset)} of {len(self.ranges)} activations of {type(self.model).__name__} were not seen in "
                f"calibration and would stay unquantized: {', '.join(unset)}"
            )
        self._activate(self.parts)

    def choose(self, estimator: str) -> None:
        """Use the "minmax", "percentile" or "mse" ranges, of which the last two need histograms.

        "mse" rounds the weights by least squares too.
        """
        for activation in self.ranges.values():
            activation.choose(estimator)
        self._round_weights(mse_weight if estimator == "mse" else int8_weight)
        self._activate(self.parts)

    @contextmanager
    def only(self, part: str) -> Iterator[PreTrainedModel]:
        """A context in which only that part is quantized."""
        self._activate([part])
        try:
            yield self.model
        finally:
            self._activate(self.parts)

    def distinct_values(self, batches: list[dict]) -> dict[str, int]:
        """{activation: number of distinct values in the last batch after rounding; 0 if it is not rounded}."""
        self.levels = levels = {}
        try:
            per_text_loss(self.model, batches)
        finally:
            self.levels = None
        return {name: levels.get(name, 0) for name in self.ranges}

    def real_entries(self, values: Tensor) -> Tensor | None:
        """A boolean tensor over the leading dimensions of `values`, False for padding; None where nothing is padded."""
        mask = self._mask
        if mask is not None and values.dim() == 4:  # scores or weights of the attention (B, H, T, T)
            return (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(values)
        return mask if mask is not None and values.shape[:2] == mask.shape else None

    def _attach(self) -> None:
        self.model.base_model.register_forward_pre_hook(self._remember_mask, with_kwargs=True)
        weighted = (nn.Linear, nn.Embedding, nn.LayerNorm) if self.published else (nn.Linear, nn.Embedding)
        for name, module in self.model.named_modules():
            layer = re.search(r"\b(layer\.\d+)\.", name)
            in_encoder = name.startswith(f"{self.model.base_model_prefix}.")
            part = layer[1] if layer else "embeddings" if in_encoder else "head"
            if self.published and (part == "head" or name.endswith(".attention.self.gate")):
                continue  # these stay in float32 in the published setting
            if isinstance(module, weighted):
                self._weights.append((part, module, module.weight.detach()))
            inputs, outputs = _published_places(name, module) if self.published else _our_places(name, module)
            if inputs:
                self._on_input(name, module, part)
            if outputs:
                self._on_output(f"{name}.output", module, part)
            if name.endswith(".attention.self"):
                module.quantizers = [self._range(f"{name}.{what}", part) for what in ("scores", "weights")]
                self._on_output(f"{name}.context", module, part)
        if self.published:
            self._on_partial_sum()

    def _range(self, name: str, part: str) -> _Range:
        return self.ranges.setdefault(name, _Range(self, part, name))

    def _on_input(self, name: str, module: nn.Module, part: str) -> None:
        quantize = self._range(f"{name}.input", part)
        module.register_forward_pre_hook(lambda _, inputs: (quantize(inputs[0]), *inputs[1:]))

    def _on_output(self, name: str, module: nn.Module, part: str) -> None:
        quantize = self._range(name, part)

        def hook(module: nn.Module, inputs: tuple, output):
            if isinstance(output, tuple):  # of the self-attention: the context and the weights
                return quantize(output[0]), *output[1:]
            return quantize(output)

        module.register_forward_hook(hook)

    def _on_partial_sum(self) -> None:
        """Quantize the sum of word and token type embeddings, before positions are added.

        The token type embeddings return this sum, and the word embeddings return zeros.
        """
        embeddings = getattr(self.model.base_model, "embeddings", None)
        words = getattr(embeddings, "word_embeddings", None)
        types = getattr(embeddings, "token_type_embeddings", None)
        if words is None or types is None:
            return
        quantize = self._range(f"{self.model.base_model_prefix}.embeddings.words_and_types", "embeddings")
        word_outputs = []

        def hold(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            word_outputs.append(output)
            return torch.zeros_like(output)

        words.register_forward_hook(hold)
        types.register_forward_hook(lambda module, inputs, output: quantize(word_outputs.pop() + output))

    def _remember_mask(self, module: nn.Module, inputs: tuple, keywords: dict) -> None:
        mask = keywords.get("attention_mask")
        self._mask = None if mask is None or mask.all() else mask.bool()

    def _round_weights(self, rounding) -> None:
        self._rounded = [rounding(exact) for _, _, exact in self._weights]

    def _activate(self, parts) -> None:
        self.active = set(parts)
        for (part, module, exact), rounded in zip(self._weights, self._rounded, strict=True):
            module.weight.data = rounded if part in self.active else exact


def _our_places(name: str, module: nn.Module) -> tuple[bool, bool]:
    """Whether (input, output) of a module are quantized in our static schemes."""
    norm = isinstance(module, nn.LayerNorm)
    linear = isinstance(module, nn.Linear)
    # The outputs of the other linear layers are quantized after their activation function, as in a fused kernel.
    return norm or linear, norm or (linear and bool(re.search(r"\.(query|key|value|output\.dense)$", name)))


def _published_places(name: str, module: nn.Module) -> tuple[bool, bool]:
    """The same for the published setting: every tensor once, as an output; the sum before a LayerNorm as its input."""
    norm = isinstance(module, nn.LayerNorm)
    linear = isinstance(module, nn.Linear) and not name.endswith(".intermediate.dense")
    return norm, norm or linear or name.endswith(".intermediate")  # which is the output of the activation function


def joined(ids: list[list[int]], length: int) -> list[list[int]]:
    """The texts joined and cut into sequences of `length` tokens, as the published setting prepares its text.

    A shorter rest at the end is dropped, unless the whole text is shorter than `length`.
    """
    tokens = list(chain.from_iterable(ids))
    whole = max(len(tokens) // length, 1) * length
    return [tokens[start : start + length] for start in range(0, min(whole, len(tokens)), length)]


# ------------------------------------------------------------------------------------- the schemes without ranges


def dynamic_w8a8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose nn.Linear layers have 8-bit weights, one scale for each row, and inputs, one for each token."""
    quantized = with_rounded_weights(model, int8_rows)
    for module in quantized.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (int8_rows(inputs[0]), *inputs[1:]))
    return quantized


def with_rounded_weights(model: PreTrainedModel, rounding: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy whose nn.Linear layers have rounded weights: w4_weight_only where `rounding` is int4_weight."""
    quantized = measured_copy(model)
    for module in quantized.modules():
        if isinstance(module, nn.Linear):  # each gets a new parameter, so a tied embedding stays exact
            module.weight = nn.Parameter(rounding(module.weight), requires_grad=False)
    return quantized


# ------------------------------------------------------------------------------------------------------- the damage


def measure_damage(
    model: PreTrainedModel,
    batches: list[dict],
    draws: list[list[dict]],
    published: list[dict],
    label: str = "",
) -> dict:
    """Held-out loss of every scheme and its gap to float32, in nats per masked token.

    The static schemes quantize inside the attention. They are absent from the result for a model that does not take its
    attention from transformers' attention interface; so is bfloat16 if the attention of such a model cannot run in it.

    Args:
        model: a masked-LM in float32.
        batches: `held_out_batches` of held-out text, which are scored.
        draws: lists of such batches of training text, in random order. w8a8_static is calibrated on each of them, and
            its loss is their mean; the percentile and mse ranges come from the first list only.
        published: such batches of full sequences (`joined`) of held-out text, which w8a8_published is calibrated on.
        label: text of the progress bar.

    Returns:
        {"schemes": {scheme: {"loss", "perplexity", "gap", "error": standard error of the gap, "floor": twice that;
                     w8a8_static has "draws" too: the gap with each draw}},
         "masked_tokens": number,
         "masked": number of masked tokens of every text scored,
         "texts": {scheme: sum of the losses of every text}, in the same order,
         "parts": {part: gap of w8a8_static, first draw, with only that part quantized, on some of the batches},
         "part_floors": {part: twice the standard error of that gap over the texts},
         "ranges": {activation: [low, high] of w8a8_static, first draw}}
    """
    sums: dict[str, Tensor] = {}  # of per_text_loss, by scheme
    draws = [] if hides_attention(model) else draws
    draw_sums: list[Tensor] = []  # of per_text_loss, of w8a8_static by draw
    static = {"parts": {}, "part_floors": {}, "ranges": {}}
    with tqdm(total=len(SCHEMES) + len(draws) - 1, desc=f"{label}: quantization", unit="pass") as bar:

        def score(scheme: str, quantized: PreTrainedModel) -> Tensor:
            sums[scheme] = per_text_loss(quantized, batches)
            bar.update()
            return sums[scheme]

        plain = measured_copy(model)
        score("float32", plain)
        try:
            score("bfloat16", measured_copy(model).to(torch.bfloat16))
        except RuntimeError:  # some attentions compute in float32 alone
            if not hides_attention(model):
                raise
        if draws:
            part_batches = batches[:: math.ceil(len(batches) / PART_BATCHES)]
            draw_sums, static = _score_static(model, plain, draws, part_batches, score)
            sums["w8a8_static"] = torch.stack(draw_sums).mean(0)
            score("w8a8_published", StaticW8A8(model, published, published=True).model)
        score("w8a8_dynamic", dynamic_w8a8(model))
        score("w4_weight_only", with_rounded_weights(model, int4_weight))
    return {**_losses_and_gaps(sums, draw_sums), **static}


def _score_static(
    model: PreTrainedModel, plain: PreTrainedModel, draws: list[list[dict]], part_batches: list[dict], score: Callable
) -> tuple[list[Tensor], dict]:
    """Score w8a8_static with every draw of calibration batches, and our other static schemes with the first draw.

    Returns:
        ((texts, 2) of w8a8_static for each draw, {"parts", "part_floors", "ranges"} of `measure_damage`).
    """
    static = StaticW8A8(model, draws[0], histograms=True)
    draw_sums = [score("w8a8_static", static.model)]
    parts, part_floors = part_gaps(static, plain, part_batches)
    ranges = {name: [activation.low, activation.high] for name, activation in static.ranges.items()}
    for estimator in ("percentile", "mse"):
        static.choose(estimator)
        score(f"w8a8_{estimator}", static.model)
    for draw in draws[1:]:
        static.calibrate(draw)
        draw_sums.append(score("w8a8_static", static.model))
    return draw_sums, {"parts": parts, "part_floors": part_floors, "ranges": ranges}


def _losses_and_gaps(sums: dict[str, Tensor], draw_sums: list[Tensor]) -> dict:
    """The part of `measure_damage`'s result that follows from the losses of every text."""
    exact, masked = sums["float32"].T
    draw_gaps = [((of_draw[:, 0] - exact).sum() / masked.sum()).item() for of_draw in draw_sums]
    masked = masked.numpy()
    texts = {scheme: sums[scheme][:, 0].numpy() for scheme in SCHEMES if scheme in sums}
    return {
        "schemes": {
            scheme: scheme_figures(losses, texts["float32"], masked, draw_gaps if scheme == "w8a8_static" else [])
            for scheme, losses in texts.items()
        },
        "masked_tokens": int(masked.sum()),
        "masked": masked.astype(int).tolist(),
        "texts": {scheme: [float(f"{loss:.6g}") for loss in losses] for scheme, losses in texts.items()},
    }


def part_gaps(
    static: StaticW8A8, plain: PreTrainedModel, batches: list[dict]
) -> tuple[dict[str, float], dict[str, float]]:
    """({part: gap to `plain` in nats per masked token with only that part quantized}, {part: floor of that gap})."""
    exact, masked = per_text_loss(plain, batches).T.numpy()
    gaps, floors = {}, {}
    for part in static.parts:
        with static.only(part) as quantized:
            differences = per_text_loss(quantized, batches)[:, 0].numpy() - exact
        gaps[part] = float(differences.sum() / masked.sum())
        floors[part] = 2 * gap_error(differences, masked)
    return gaps, floors


def scheme_figures(sums: np.ndarray, exact: np.ndarray, masked: np.ndarray, draw_gaps: list[float]) -> dict:
    """What `measure_damage` returns of one scheme.

    Args:
        sums, exact: (texts,) losses in this scheme and in float32, summed over the masked tokens of a text.
        masked: (texts,) numbers of masked tokens.
        draw_gaps: the gap with each draw of calibration texts, if there are several.
    """
    loss = float(sums.sum() / masked.sum())
    gap = loss - float(exact.sum() / masked.sum())
    error = gap_error(sums - exact, masked)
    if len(draw_gaps) > 1:
        error = math.hypot(error, float(np.std(draw_gaps, ddof=1)) / math.sqrt(len(draw_gaps)))
    draws = {"draws": draw_gaps} if draw_gaps else {}
    return {"loss": loss, "perplexity": perplexity(loss), "gap": gap, "error": error, "floor": 2 * error, **draws}


def gap_error(differences: np.ndarray, masked: np.ndarray) -> float:
    """Standard error, over texts, of the ratio sum(differences) / sum(masked), linearised; NaN for a single text.

    Cochran, "Sampling Techniques" (1977), chapter 6.

    Args:
        differences: (texts,) nats.
        masked: (texts,) numbers of masked tokens.
    """
    count = len(masked)
    if count < 2:
        return math.nan
    residuals = differences - differences.sum() / masked.sum() * masked
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / masked.sum())


def bootstrap_difference(before: dict, after: dict, scheme: str) -> tuple[float, float]:
    """95 % percentile interval, over texts, of the gap of a scheme in one run minus its gap in another run.

    Texts are drawn with replacement, the same ones for both runs, for the scheme and for float32 (Efron and Tibshirani,
    "An Introduction to the Bootstrap", 1993, chapter 13). The seeds of the runs and the calibration are held fixed.

    Args:
        before, after: what `measure_damage` returned for the two runs, or read from analysis.json.
        scheme: a key of SCHEMES.

    Returns:
        (low, high) of gap(after) - gap(before), in nats per masked token; NaN where a loss is not finite.

    Raises:
        ValueError: the runs were not scored on the same texts with the same masks.
    """
    if before["masked"] != after["masked"]:
        raise ValueError("the two runs were scored on different texts or masks, so their gaps cannot be compared")
    masked = np.array(before["masked"], dtype=float)
    gap_before, gap_after = (
        np.subtract(*(np.array(run["texts"][name], dtype=float) for name in (scheme, "float32")))
        for run in (before, after)
    )
    differences = gap_after - gap_before
    if not np.isfinite(differences).all():
        return math.nan, math.nan
    chosen = np.random.default_rng(0).integers(len(masked), size=(RESAMPLES, len(masked)))
    low, high = np.percentile(differences[chosen].sum(1) / masked[chosen].sum(1), [2.5, 97.5])
    return float(low), float(high)
