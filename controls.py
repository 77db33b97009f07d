"""Controls: models whose quantization damage is known beforehand, and models with a published remedy for outliers.

The remedies are clipped softmax and gated attention, of Bondarenko et al., "Quantizable Transformers" (NeurIPS 2023).
Importing this module registers them with transformers' Auto classes; without it, no class loads their folders.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.masking_utils import sdpa_mask

import quantization
from held_out import held_out_loss
from outliers import hides_attention
from quantization import StaticW8A8, UnsetRange, measured_copy, part_gaps
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, apply_softmax_n
from tables import number

# ------------------------------------------------------------------------------------------------- the self-check

CHECKS = {
    "large_outlier": "an outlier of 1,000 is felt, in its layer",
    "small_outlier": "an outlier of 100 is felt far less",
    "class_swap": "the same function in another class",
    "rounding": "every activation on 256 levels",
}
LARGE, SMALL = 1000.0, 100.0  # sizes of the outliers; entries of the residual stream of these models are 1 to 10
CHECK_BATCHES = 3  # number of scored batches, and of calibration batches, that a check uses
FELT = 0.1  # nats that a large outlier must cost at least: it leaves the layer one of its 256 levels
UNCHANGED = 1e-3  # nats by which float32 rounding may change a loss, with an outlier of 1,000 or in another class
LEARNT = 0.5  # nats that a model must lose without its context: otherwise it has too little that could be damaged
NEARLY_ZERO = 1e-300  # an n that acts as 0 even where all logits of a row are below -69, the logarithm of 1e-30


@torch.no_grad()
def compensated_outlier(model: PreTrainedModel, layer: int, channel: int, size: float) -> PreTrainedModel:
    """A copy that computes the same function in float32, with an outlier of `size` in one layer's FFN output.

    In one channel, `size` is added to the bias of the FFN output and subtracted from the bias of the LayerNorm before
    the FFN. The first bias of the FFN compensates for its changed input. So the input of the layer's last LayerNorm is
    the same as before.

    Args:
        model: a BERT-shaped masked-LM (post-LayerNorm).
        layer, channel: place of the outlier.
        size: size of the outlier, in the units of the hidden state.
    """
    copied = copy.deepcopy(model)
    block = copied.base_model.encoder.layer[layer]
    block.output.dense.bias[channel] += size
    block.attention.output.LayerNorm.bias[channel] -= size
    block.intermediate.dense.bias += size * block.intermediate.dense.weight[:, channel]
    return copied


def other_class(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same weights and the same function in the other class: stock RoBERTa as our class, ours as stock RoBERTa.

    None for a model that is neither.
    """
    if type(model) not in (RobertaForMaskedLM, RobertaSoftmaxNForMaskedLM):
        return None
    of_class = ("model_type", "auto_map", "softmax_n", "_attn_implementation")
    settings = {key: value for key, value in model.config.to_dict().items() if key not in of_class}
    n = measured_copy(model).config.softmax_n
    with torch.random.fork_rng(devices=[]):
        if type(model) is RobertaForMaskedLM:
            config = RobertaSoftmaxNConfig(**settings, softmax_n=n or NEARLY_ZERO)
            swapped = RobertaSoftmaxNForMaskedLM(config)
        else:
            swapped = apply_softmax_n(RobertaForMaskedLM(RobertaConfig(**settings)), n)
    swapped.load_state_dict(model.state_dict())
    return swapped.to(model.device).eval()


def self_check(model: PreTrainedModel, scored: list[dict], calibration: list[dict]) -> dict:
    """Whether quantization.py measures, on this model, the damage that is known beforehand.

    Args:
        model: a trained BERT-shaped masked-LM in float32.
        scored, calibration: batches of `held_out_batches`; a few of each are used.

    Returns:
        {"passed": True, False, or None where the model has learnt too little to tell; "texts": number of texts scored;
        "context": nats by which the loss rises when all tokens are moved by one place; and for each key of CHECKS
        {"passed", "said": the result in words, and its figures}}. "class_swap" is undecided for a class without
        counterpart; every check is, for a model that is not statically quantized.
    """
    if hides_attention(model):
        return {"passed": None, "texts": 0, "context": None} | unchecked(CHECKS, None, "its attention is not quantized")
    scored, calibration = spread_out(scored), spread_out(calibration)
    moved = [{**batch, "input_ids": batch["input_ids"].roll(1, 1)} for batch in scored]
    plain = measured_copy(model)
    exact = held_out_loss(plain, scored)[0]
    context = held_out_loss(plain, moved)[0] - exact
    checks: dict = {"passed": None, "texts": sum(len(batch["labels"]) for batch in scored), "context": context}
    outlier_checks = ("large_outlier", "small_outlier")
    changed_by_outliers = ("encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.intermediate.dense")
    try:
        static = StaticW8A8(model, calibration)
        checks["rounding"] = check_rounding(static, scored[-1:])
        gap = held_out_loss(static.model, scored)[0] - exact
        checks["class_swap"] = check_class(model, gap, scored, calibration)
        if not dict(model.base_model.named_modules()).keys() >= set(changed_by_outliers):
            checks |= unchecked(outlier_checks, None, "not a post-LayerNorm model")
        elif not context >= LEARNT:  # too little, or NaN
            checks |= unchecked(outlier_checks, None, "the model has learnt too little")
        else:
            checks |= check_outliers(model, gap, exact, scored, calibration)
    except UnsetRange as error:
        return checks | {"passed": False} | unchecked(CHECKS, False, str(error))
    verdicts = [checks[key]["passed"] for key in CHECKS]
    checks["passed"] = False if False in verdicts else checks["large_outlier"]["passed"]
    return checks


def unchecked(checks: Iterable[str], passed: bool | None, why: str) -> dict[str, dict]:
    """The same result for checks that could not be made."""
    return {check: {"passed": passed, "said": why} for check in checks}


def spread_out(batches: list[dict]) -> list[dict]:
    """CHECK_BATCHES of the batches, from the middles of equal parts."""
    count = min(CHECK_BATCHES, len(batches))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def check_rounding(static: StaticW8A8, batches: list[dict]) -> dict:
    levels = static.distinct_values(batches)
    wrong = [name for name, count in levels.items() if not 1 <= count <= 256]
    said = f"{len(levels) - len(wrong)} of {len(levels)} activations"
    return {"passed": not wrong, "said": said, "most_levels": max(levels.values()), "wrong": wrong}


def check_class(model: PreTrainedModel, gap: float, scored: list[dict], calibration: list[dict]) -> dict:
    other = other_class(model)
    if other is None:
        return {"passed": None, "said": "there is no other class"}
    swapped = held_out_loss(StaticW8A8(other, calibration).model, scored)[0]
    swapped -= held_out_loss(measured_copy(other), scored)[0]
    agree = abs(swapped - gap) < UNCHANGED if math.isfinite(gap) else None
    said = f"gap {number(gap, 4)} and {number(swapped, 4)} nats"
    return {"passed": agree, "said": said, "gap": gap, "swapped_gap": swapped}


def check_outliers(
    model: PreTrainedModel, gap: float, exact: float, scored: list[dict], calibration: list[dict]
) -> dict[str, dict]:
    """Compensated outliers in all layers, or in the first, middle and last one of more than three.

    Args:
        model, scored, calibration: as in `self_check`.
        gap, exact: gap and float32 loss of the model itself.
    """
    depth = len(model.base_model.encoder.layer)
    by_layer: dict[str, dict] = {}
    for layer in range(depth) if depth <= 3 else (0, depth // 2, depth - 1):
        control = compensated_outlier(model, layer, 0, LARGE)
        static = StaticW8A8(control, calibration)
        plain = measured_copy(control)
        unchanged = held_out_loss(plain, scored)[0]
        parts, _ = part_gaps(static, plain, scored)
        by_layer[f"layer.{layer}"] = {
            "float32_change": unchanged - exact,
            "gap": held_out_loss(static.model, scored)[0] - unchanged,
            "parts": parts,
            "largest_part": max(parts, key=parts.get),
        }
        del control, static, plain
        gc.collect()  # hooks and the object that owns them refer to each other: each copy would stay in memory
    gaps = [of_layer["gap"] for of_layer in by_layer.values()]
    right = sum(name == of_layer["largest_part"] for name, of_layer in by_layer.items())
    unchanged = all(abs(of_layer["float32_change"]) < UNCHANGED for of_layer in by_layer.values())
    large = {
        "passed": unchanged and all(large_gap - gap > FELT for large_gap in gaps) and right == len(by_layer),
        "said": f"gap {number(min(gaps), 3)} to {number(max(gaps), 3)} nats, right layer in {right} of {len(by_layer)}",
        "gap_without": gap,
        "layers": by_layer,
    }
    middle = list(by_layer)[len(by_layer) // 2]
    control = compensated_outlier(model, int(middle.partition(".")[2]), 0, SMALL)
    small_gap = held_out_loss(StaticW8A8(control, calibration).model, scored)[0] - exact
    small = {
        "passed": small_gap - gap < (by_layer[middle]["gap"] - gap) / 2,
        "said": f"gap {number(small_gap, 3)} nats in {middle}, {number(gap, 3)} without",
        "gap": small_gap,
    }
    return {"large_outlier": large, "small_outlier": small}


# ------------------------------------------------------------------------------------------- the published remedies

STOP_STOCK = ", in a control of this experiment: import controls, then use an Auto class"  # as in softmax1.py


class _ControlConfig(RobertaConfig):
    """RobertaConfig whose saved form no stock class can load: it names an activation function that does not exist."""

    def __init__(self, **kwargs):
        if isinstance(kwargs.get("hidden_act"), str):
            kwargs["hidden_act"] = kwargs["hidden_act"].removesuffix(STOP_STOCK)
        super().__init__(**kwargs)

    def to_diff_dict(self) -> dict:
        """The content of config.json."""
        return {**super().to_diff_dict(), "hidden_act": f"{self.hidden_act}{STOP_STOCK}"}


class ClippedSoftmaxConfig(_ControlConfig):
    """Weights clip((zeta - gamma) softmax + gamma, 0, 1); the defaults are Bondarenko et al.'s for BERT."""

    model_type = "roberta-clipped-softmax"

    def __init__(self, clip_gamma: float = -0.025, clip_zeta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.clip_gamma = clip_gamma
        self.clip_zeta = clip_zeta

    @RobertaConfig._attn_implementation.getter
    def _attn_implementation(self) -> str:
        """Always clipped softmax, or the attention of quantization.py, which calls `attention_weights`."""
        requested = getattr(self, "_attn_implementation_internal", None)
        return requested if requested == quantization.ATTENTION else CLIPPED

    def attention_weights(self, scores: Tensor) -> Tensor:
        """Attention weights of scores (..., keys); the score of a masked key is -inf."""
        gamma, zeta = self.clip_gamma, self.clip_zeta
        return ((zeta - gamma) * torch.softmax(scores, -1) + gamma).clip(0, 1)


class GatedAttentionConfig(_ControlConfig):
    """One gate for each head and token, sigmoid(linear(hidden state)), which multiplies the context of the head."""

    model_type = "roberta-gated-attention"

    def __init__(self, **kwargs):  # otherwise transformers generates an __init__, which hides that of _ControlConfig
        super().__init__(**kwargs)


GATE = ".gate."  # in the name of every parameter that the stock class does not have
CLIPPED = "clipped_softmax"  # the name under which transformers knows the attention below


def clipped_softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Args and result as in softmax1.softmax_n_attention_forward. A mask (T, T) keeps packed sequences apart."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if cu_seq_lens_q is not None:
        token = torch.arange(query.shape[2], device=query.device, dtype=cu_seq_lens_q.dtype)
        sequence = torch.searchsorted(cu_seq_lens_q, token, right=True)
        scores = scores.masked_fill(sequence[:, None] != sequence, -math.inf)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    weights = module.config.attention_weights(scores.float()).to(value.dtype)
    weights = F.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(CLIPPED, clipped_softmax_attention)
AttentionMaskInterface.register(CLIPPED, sdpa_mask)


class ClippedSoftmaxForMaskedLM(RobertaForMaskedLM):
    """RobertaForMaskedLM with clipped softmax."""

    config_class = ClippedSoftmaxConfig


class GatedAttentionForMaskedLM(RobertaForMaskedLM):
    """RobertaForMaskedLM with gated attention.

    The gates are initialised last, so all other weights start as in the stock class with the same seed.
    """

    config_class = GatedAttentionConfig

    def __init__(self, config: GatedAttentionConfig):
        super().__init__(config)
        for layer in self.base_model.encoder.layer:
            attention = layer.attention.self
            attention.gate = nn.Linear(config.hidden_size, config.num_attention_heads)
            nn.init.normal_(attention.gate.weight, std=config.initializer_range)
            nn.init.zeros_(attention.gate.bias)  # gates start half open
            attention.register_forward_hook(_gated, with_kwargs=True)


def _gated(attention: nn.Module, inputs: tuple, keywords: dict, output: tuple) -> tuple:
    hidden = inputs[0] if inputs else keywords["hidden_states"]
    gate = torch.sigmoid(attention.gate(hidden))  # (B, T, H)
    context = output[0].unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]
    return context.flatten(-2), *output[1:]


CONTROLS = {
    "clipped": (ClippedSoftmaxConfig, ClippedSoftmaxForMaskedLM),
    "gated": (GatedAttentionConfig, GatedAttentionForMaskedLM),
}
for _config, _model in CONTROLS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForMaskedLM.register(_config, _model, exist_ok=True)


def build_control(kind: str, config_kwargs: dict) -> PreTrainedModel:
    """RoBERTa with random weights and a published remedy, for padded batches.

    After experiment.accept_packed_batches it takes packed batches too.

    Args:
        kind: "clipped" or "gated".
        config_kwargs: arguments of RobertaConfig; for "clipped" also clip_gamma and clip_zeta.

    Raises:
        ValueError: there is no such control.
    """
    if kind not in CONTROLS:
        raise ValueError(f"a control is one of {', '.join(CONTROLS)}, got {kind!r}")
    config, model = CONTROLS[kind]
    return model(config(**config_kwargs))
