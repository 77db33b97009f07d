"""Post-training quantization of a masked-LM, and what it costs in held-out loss.

    bfloat16          weights and arithmetic in bfloat16
    w8a8_static       8-bit weights and activations, one fixed range a tensor: the setting that outliers break
    w8a8_dynamic      8-bit weights (a scale a row) and inputs (a scale a token, found as it comes) of every nn.Linear
    w4_weight_only    4-bit weights (a scale for 128 inputs of a row) of every nn.Linear, float32 activations

`w8a8_static` follows Bondarenko et al., "Quantizable Transformers" (NeurIPS 2023), and the code they published with it
(validate_mlm.py): weights symmetric, activations asymmetric, both per tensor; weight ranges from minimum and maximum,
activation ranges from a running minimum and maximum (momentum 0.9) over 16 batches; arithmetic simulated in float32
("fake quantization"). Three choices differ: ranges come from training text, not from the text that is scored; the
masked-LM head is quantized too, except for the logits; and the inputs of every nn.Linear count by themselves.

Quantized are, per tensor:
    weights       of every nn.Linear and nn.Embedding (biases and LayerNorm parameters stay float32)
    activations   the input of every nn.Linear; query, key and value; the attention scores, the attention weights and
                  their product with the values; the outputs of attention.output.dense and output.dense; what enters
                  and what leaves every LayerNorm (that is, the residual stream)

The rounding is torch's own fake quantization everywhere. torchao has the last two schemes, but not the first; and where
it is installed, transformers imports it into every script, with four warnings each time.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from held_out import held_out_loss
from softmax1 import softmax_n

CALIBRATION_BATCHES = (
    16  # unless told otherwise; and the momentum: Bondarenko et al., quant_configs.py and range_estimators.py
)
MOMENTUM = 0.9
GROUP_SIZE = 128  # of the 4-bit weights: the usual one (GPTQ, AWQ)
PART_BATCHES = 8  # of the held-out text, evenly spread, for the damage of one part alone

SCHEMES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "w8a8_static": "W8A8, static per tensor",
    "w8a8_dynamic": "W8A8, dynamic per token",
    "w4_weight_only": "W4, weights only",
}
ATTENTION = "fake_quantized"  # the name under which transformers knows the attention below


def int8_weight(weight: Tensor) -> Tensor:
    """`weight` on the grid of symmetric 8-bit integers with one scale, max |w| / 127."""
    return _symmetric(weight.detach().reshape(1, -1), 127).reshape(weight.shape)


def int8_rows(values: Tensor) -> Tensor:
    """The same with a scale for each row, which is what lies along the last dimension."""
    return _symmetric(values.detach().reshape(-1, values.shape[-1]), 127).reshape(values.shape)


def int4_weight(weight: Tensor) -> Tensor:
    """`weight` (outputs, inputs) on the grid of symmetric 4-bit integers with a scale, max |w| / 7, for each group.

    A group is GROUP_SIZE inputs of a row, or the largest divisor of the inputs below that.
    """
    size = max(divisor for divisor in range(1, GROUP_SIZE + 1) if weight.shape[1] % divisor == 0)
    return _symmetric(weight.detach().reshape(-1, size), 7).reshape(weight.shape)


def _symmetric(rows: Tensor, levels: int) -> Tensor:
    # A row of zeros needs some scale; any will do.
    scale = (rows.abs().amax(1).float() / levels).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    return torch.fake_quantize_per_channel_affine(rows.float(), scale, zero, 0, -levels - 1, levels).to(rows.dtype)


def relative_error(exact: Tensor, rounded: Tensor) -> float:
    """||exact - rounded|| / ||exact||, 0 for a tensor of zeros."""
    norm = exact.detach().double().norm()
    return ((exact.detach().double() - rounded.detach().double()).norm() / norm).item() if norm else 0.0


# ----------------------------------------------------------------------------------------------------- W8A8, static


class _Range:
    """One activation tensor: first its range is estimated, then it is rounded to 256 levels of that range."""

    def __init__(self, owner: StaticW8A8, part: str):
        self.owner = owner
        self.part = part
        self.low: float | None = None
        self.high = 0.0

    def __call__(self, values: Tensor, chosen: Tensor | None = None) -> Tensor:
        """`chosen` selects the entries that are real: a boolean tensor over the leading dimensions of `values`."""
        if self.owner.observing:
            self._observe(values if chosen is None else values[chosen])
            return values
        if self.part not in self.owner.active or self.low is None:
            return values
        scale = max((self.high - self.low) / 255, torch.finfo(torch.float32).tiny)
        zero = min(max(round(-self.low / scale), 0), 255)
        return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)

    def _observe(self, values: Tensor) -> None:
        low, high = (value.item() for value in torch.aminmax(values.detach()))
        low, high = min(low, 0.0), max(high, 0.0)  # 0 must be exact, as in every integer kernel
        if self.low is None:
            self.low, self.high = low, high
        else:
            self.low = MOMENTUM * self.low + (1 - MOMENTUM) * low
            self.high = MOMENTUM * self.high + (1 - MOMENTUM) * high


class StaticW8A8:
    """A copy of a masked-LM with statically quantized weights and activations (see the top of this file).

    Args:
        model: a BERT-shaped masked-LM that takes its attention from transformers' attention interface.
        calibration: batches of `held_out_batches`, made of training text.

    Attributes:
        model: the copy, quantized throughout.
        parts: "embeddings", "layer.<i>" and "head", in order.

    Raises:
        ValueError: the model does not use the attention interface.
    """

    def __init__(self, model: PreTrainedModel, calibration: list[dict]):
        if not model._supports_attention_backend:
            raise ValueError(f"{type(model).__name__} does not take its attention from the attention interface")
        self.model = copy.deepcopy(model).eval()
        self.observing = False
        self.active: set[str] = set()
        self.ranges: dict[str, _Range] = {}
        self._mask: Tensor | None = None
        self._weights: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._untie()
        self._attach()
        self.parts = sorted({part for part, *_ in self._weights}, key=_order)
        self.observing = True
        held_out_loss(self.model, calibration)
        self.observing = False
        self._activate(self.parts)

    def _untie(self) -> None:
        """The decoder gets a weight of its own, so that it can be quantized without the embeddings."""
        decoder = self.model.get_output_embeddings()
        decoder.weight = nn.Parameter(decoder.weight.detach().clone(), requires_grad=False)

    def _attach(self) -> None:
        base = self.model.base_model
        base.register_forward_pre_hook(self._remember_mask, with_kwargs=True)
        decoder = self.model.get_output_embeddings()
        inside = f"{self.model.base_model_prefix}."
        for name, module in self.model.named_modules():
            part = _part(name, inside)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                self._weights.append((part, module, module.weight.detach(), int8_weight(module.weight)))
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                self._on_input(name, module, part)
            # Another linear layer's output is quantized behind its activation function, as a fused kernel does.
            added = isinstance(module, nn.Linear) and re.search(r"\.(query|key|value|output\.dense)$", name)
            if added or (isinstance(module, nn.LayerNorm) and module is not decoder):
                self._on_output(name, module, part)
            if re.search(r"\.attention\.self$", name):
                module.quantizers = [self._range(f"{name}.{what}", part) for what in ("scores", "weights", "context")]
                module.real_tokens = lambda: self._mask
        # Set past set_attn_implementation, which softmax_n models rightly refuse: the attention below knows their n.
        self.model.config._attn_implementation = ATTENTION

    def _range(self, name: str, part: str) -> _Range:
        return self.ranges.setdefault(name, _Range(self, part))

    def _real(self, values: Tensor) -> Tensor | None:
        return self._mask if self._mask is not None and values.shape[:2] == self._mask.shape else None

    def _on_input(self, name: str, module: nn.Module, part: str) -> None:
        quantize = self._range(f"{name}.input", part)
        module.register_forward_pre_hook(lambda _, inputs: (quantize(inputs[0], self._real(inputs[0])), *inputs[1:]))

    def _on_output(self, name: str, module: nn.Module, part: str) -> None:
        quantize = self._range(f"{name}.output", part)
        module.register_forward_hook(lambda _, __, output: quantize(output, self._real(output)))

    def _remember_mask(self, module: nn.Module, inputs: tuple, keywords: dict) -> None:
        mask = keywords.get("attention_mask")
        self._mask = None if mask is None else mask.bool()

    def _activate(self, parts) -> None:
        self.active = set(parts)
        for part, module, exact, rounded in self._weights:
            module.weight.data = rounded if part in self.active else exact

    @contextmanager
    def only(self, part: str) -> Iterator[PreTrainedModel]:
        """Inside, nothing but that part is quantized."""
        self._activate([part])
        try:
            yield self.model
        finally:
            self._activate(self.parts)


def _part(name: str, inside: str) -> str:
    if match := re.search(r"\blayer\.(\d+)\.", name):
        return f"layer.{match[1]}"
    return "embeddings" if name.startswith(inside) else "head"


def _order(part: str) -> tuple:
    return (("embeddings", "layer", "head").index(part.partition(".")[0]), int(part.partition(".")[2] or 0))


def _fake_quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """softmax_n attention (softmax where the config has no n) whose scores, weights and output are quantized.

    Args and result as in softmax1.softmax_n_attention_forward; for evaluation only, so `dropout` is not applied.
    """
    n = getattr(module.config, "softmax_n", 0.0)
    on_scores, on_weights, on_output = module.quantizers
    real = module.real_tokens()
    pairs = None if real is None else (real[:, None, :, None] & real[:, None, None, :])
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = on_scores(scores, None if pairs is None else pairs.expand_as(scores))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    weights = softmax_n(scores, n)
    weights = on_weights(weights, None if pairs is None else pairs.expand_as(weights))
    output = (weights @ value).transpose(1, 2).contiguous()
    return on_output(output, real), weights


AttentionInterface.register(ATTENTION, _fake_quantized_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# ----------------------------------------------------------------------------------------------------- the others


def dynamic_w8a8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose nn.Linear layers have 8-bit weights, a scale a row, and 8-bit inputs, a scale a token."""
    quantized = _with_weights(model, int8_rows)
    for module in quantized.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (int8_rows(inputs[0]), *inputs[1:]))
    return quantized


def weight_only_w4(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose nn.Linear layers have 4-bit weights."""
    return _with_weights(model, int4_weight)


def _with_weights(model: PreTrainedModel, rounded) -> PreTrainedModel:
    quantized = copy.deepcopy(model).eval()
    for module in quantized.modules():
        if isinstance(module, nn.Linear):  # a new parameter each, so that a tied embedding stays exact
            module.weight = nn.Parameter(rounded(module.weight), requires_grad=False)
    return quantized


def weight_errors(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Relative rounding error of every parameter: {name: {"int8_error", and for matrices "int4_error"}}."""
    errors = {}
    for name, parameter in model.named_parameters():
        errors[name] = {"int8_error": relative_error(parameter, int8_weight(parameter))}
        if parameter.dim() == 2:
            errors[name]["int4_error"] = relative_error(parameter, int4_weight(parameter))
    return errors


def measure_damage(model: PreTrainedModel, batches: list[dict], calibration: list[dict], label: str = "") -> dict:
    """Held-out loss of every scheme and its gap to float32, in nats per masked token.

    Args:
        model: a masked-LM in float32.
        batches: of `held_out_batches`, made of held-out text.
        calibration: the same, made of training text, in random order.
        label: for the progress bar.

    Returns:
        {"schemes": {scheme: {"loss", "perplexity", "gap"}}, "masked_tokens", "parts": {part: gap of W8A8 static with
        nothing but that part quantized, on every few of the batches}, "ranges": {activation: [low, high]}}
    """
    with tqdm(total=len(SCHEMES) + 1, desc=f"{label}: quantization", unit="scheme") as bar:

        def score(quantized: PreTrainedModel, some: list[dict] = batches) -> float:
            return held_out_loss(quantized, some)[0]

        losses = {}
        losses["float32"], masked = held_out_loss(model, batches)
        bar.update()
        losses["bfloat16"] = score(copy.deepcopy(model).to(torch.bfloat16))
        bar.update()
        static = StaticW8A8(model, calibration)
        losses["w8a8_static"] = score(static.model)
        bar.update()
        losses["w8a8_dynamic"] = score(dynamic_w8a8(model))
        bar.update()
        losses["w4_weight_only"] = score(weight_only_w4(model))
        bar.update()
        some = batches[:: math.ceil(len(batches) / PART_BATCHES)]
        exact = score(model, some)
        parts = {}
        for part in static.parts:
            with static.only(part) as quantized:
                parts[part] = score(quantized, some) - exact
        bar.update()
    schemes = {
        scheme: {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "gap": loss - losses["float32"],
        }
        for scheme, loss in losses.items()
    }
    ranges = {name: [found.low, found.high] for name, found in static.ranges.items() if found.low is not None}
    return {"schemes": schemes, "masked_tokens": masked, "parts": parts, "ranges": ranges}
