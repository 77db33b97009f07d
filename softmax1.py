"""softmax1 and softmax_n attention in one self-contained file (torch and transformers only).

Evan Miller, "Attention Is Off By One" (2023), https://www.evanmiller.org/attention-is-off-by-one.html:

    softmax_n(x)_i = exp(x_i) / (n + sum_j exp(x_j))          n = 0 is softmax, n = 1 is his softmax1

An attention head with n > 0 may attend to nothing: its weights sum to less than 1, and the rest, n / (n + sum exp), is
the null mass. softmax_n is softmax over one more logit of value log n whose weight is thrown away; everything below
rests on that.

    softmax_n, softmax1        the function
    softmax_n_attention        scaled dot product attention with it
    apply_softmax_n            puts it into any transformers model that uses the attention interface
    RobertaSoftmaxN...         RoBERTa with it, which keeps n through save_pretrained and from_pretrained

The file is copied to the Hub with every softmax_n model, so it imports nothing of this project.

Shape legend: B batch, H query heads, G key and value heads (H is a multiple of G), L query length, S key length,
E head size, V value head size.
"""

import math
import numbers
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

# The names under which transformers knows this attention. The eager one materialises the weights on every call, for
# models that do not hand the keyword output_attentions down to their attention (GPT-2).
ATTENTION = "softmax_n"
EAGER_ATTENTION = "softmax_n_eager"


def checked_softmax_n(n: float) -> float:
    """`n` as a float. Raises ValueError unless it is a finite real number >= 0."""
    if isinstance(n, bool) or not isinstance(n, numbers.Real) or not math.isfinite(n) or n < 0:
        raise ValueError(f"softmax_n needs a finite real number n >= 0, got {n!r}")
    return float(n)


def _log(n: float) -> float:
    return math.log(n) if n > 0 else -math.inf


# ---------------------------------------------------------------------------------------------------- the function


def softmax_n(input: Tensor, n: float = 1.0, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x_i) / (n + sum_j exp(x_j)) along `dim`, with the signature of `torch.softmax` plus n.

    Exact at any logits: the row is shifted by max(max_j x_j, log n), so nothing overflows and a row far below log n
    goes to 0 smoothly; a row of -inf gives 0 with gradient 0 (for n > 0). n = 0 is `torch.softmax` itself, bit for bit.
    Half precision is computed in float32 and rounded once, as torch's own kernel does.

    Args:
        input: any shape, floating point (other dtypes need `dtype`).
        n: finite real number >= 0.
        dim: the dimension that is normalised.
        dtype: dtype of the result; `input` is cast to it first.

    Returns:
        Tensor of the shape of `input`; sums along `dim` lie in [0, 1].

    Raises:
        ValueError: n is negative, NaN or infinite.
        TypeError: `input` is not floating point and no `dtype` is given.
    """
    n = checked_softmax_n(n)
    if n == 0:
        return torch.softmax(input, dim, dtype)
    x = input if dtype is None else input.to(dtype)
    if not x.is_floating_point():
        raise TypeError(f"softmax_n needs a floating point input or a floating point dtype, got {x.dtype}")
    result_dtype = x.dtype
    x = x.to(torch.promote_types(result_dtype, torch.float32))
    if x.numel() == 0:
        return x.to(result_dtype)
    # The shift cancels, so no gradient needs to pass through it.
    shift = x.detach().amax(dim, keepdim=True).clamp_min(_log(n))
    exponentials = torch.exp(x - shift)
    null = torch.exp(_log(n) - shift)
    return (exponentials / (exponentials.sum(dim, keepdim=True) + null)).to(result_dtype)


def softmax1(input: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x_i) / (1 + sum_j exp(x_j)) along `dim`: `softmax_n` with n = 1."""
    return softmax_n(input, 1.0, dim, dtype)


# --------------------------------------------------------------------------------------------------- its attention


def softmax_n_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    n: float = 1.0,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax_n(query key^T * scale + mask) value: `F.scaled_dot_product_attention` plus n, and exact for any real n.

    A row in which every key is masked gives output 0 and gradient 0 when n > 0.

    Args:
        query: (B, H, L, E).
        key: (B, G, S, E), with G = H unless `enable_gqa`.
        value: (B, G, S, V).
        attn_mask: broadcastable to (B, H, L, S); boolean (True takes part) or floating point, added to the scores.
        dropout_p: dropout of the attention weights; applied whatever the module's mode, as in torch.
        is_causal: query i sees keys 0..i (upper left aligned); not together with `attn_mask`.
        scale: factor of the scores; default 1 / sqrt(E).
        n: finite real number >= 0; 0 is stock attention.
        enable_gqa: heads of key and value are shared by H / G query heads each.

    Returns:
        (B, H, L, V).

    Raises:
        ValueError: n is negative, NaN or infinite, or both `attn_mask` and `is_causal` are given.
    """
    n = checked_softmax_n(n)
    if n > 0 and is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other: put the causal mask into attn_mask")
    if n == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # The one place to choose a faster kernel.
    return _zero_key_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, n, enable_gqa)


def _zero_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    n: float,
    enable_gqa: bool,
) -> Tensor:
    """softmax_n attention through torch's public attention, exactly, for n > 0.

    One more key and value of zeros: the null key's score is 0 plus its mask entry log n, so it adds n to the
    denominator, and its value adds nothing to the numerator. Dropout may drop the null key, which changes nothing, and
    treats every other weight as softmax_n attention does.
    """
    length, keys = query.shape[-2], key.shape[-2]
    null_logits = _null_logits(n, query.dtype)
    key = F.pad(key, (0, 0, 0, len(null_logits)))
    value = F.pad(value, (0, 0, 0, len(null_logits)))
    if is_causal:
        attn_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None and n != 1:  # log 1 = 0 needs no mask
        attn_mask = query.new_zeros(1, keys)
    if attn_mask is not None:
        if n != 1 and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        # Expanded first: a mask that broadcasts over the keys must not reach the null keys.
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], keys)
        for logit in null_logits:
            attn_mask = F.pad(attn_mask, (0, 1), value=True if attn_mask.dtype == torch.bool else logit)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


def _null_logits(n: float, dtype: torch.dtype) -> list[float]:
    """Logits, exact in `dtype`, whose exponentials add up to n.

    One is enough except in half precision, where log n rounded to bfloat16 would be another n by up to 0.8 %. There the
    first is log n rounded down, and a second one makes up the rest.
    """
    logit = math.log(n)
    if dtype not in (torch.float16, torch.bfloat16):
        return [logit]
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))  # of the significand: 11 or 8
    significand, exponent = math.frexp(logit)
    rounded = math.ldexp(math.floor(math.ldexp(significand, bits)), exponent - bits)
    rest = n - math.exp(rounded)
    return [rounded] if rest <= 0 else [rounded, math.log(rest)]


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    n: float,
) -> tuple[Tensor, Tensor]:
    """The definition, with the weights materialised: for who asks to see them. Returns (output, weights)."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = F.dropout(softmax_n(scores, n), dropout_p)
    return weights @ value, weights


# ------------------------------------------------------------------------------------- any transformers model with it


def softmax_n_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; n comes from `module.config.softmax_n`.

    Args and result as transformers' `AttentionInterface` has them: query (B, H, L, E), key and value (B, G, S, E),
    result (B, L, H, E) and, with `output_attentions`, the weights (B, H, L, S), after dropout as in stock eager
    attention. Their rows sum to 1 minus the null mass.

    Raises:
        ValueError: the config carries no softmax_n, or the model asks for something that softmax_n attention does not
            define here (softcap, a position bias beside the mask, an attention sink of its own, a paged cache).
    """
    n = getattr(module.config, "softmax_n", None)
    if n is None:
        raise ValueError(f"{type(module.config).__name__} has no softmax_n: choose n with apply_softmax_n(model, n)")
    for unsupported in ("softcap", "position_bias", "s_aux", "cache"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"softmax_n attention has no `{unsupported}`, which {type(module).__name__} asks for")
    # As in transformers' own sdpa attention: no mask on a causal module means purely causal, but a single query (a
    # decoding step) sees every key.
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    groups = query.shape[1] // key.shape[1]
    if output_attentions:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output, weights = _eager_attention(query, key, value, attention_mask, dropout, is_causal, scaling, n)
    else:
        output = softmax_n_attention(
            query, key, value, attention_mask, dropout, is_causal, scaling, n=n, enable_gqa=groups > 1
        )
        weights = None
    return output.transpose(1, 2).contiguous(), weights


# Without its own mask function an attention gets no mask at all, and padding would leak.
AttentionInterface.register(ATTENTION, softmax_n_attention_forward)
AttentionInterface.register(EAGER_ATTENTION, partial(softmax_n_attention_forward, output_attentions=True))
for _name in (ATTENTION, EAGER_ATTENTION):
    AttentionMaskInterface.register(_name, sdpa_mask)


def apply_softmax_n(model: PreTrainedModel, n: float) -> PreTrainedModel:
    """Make every attention of a transformers model use softmax_n ("surgery", in place). Weights stay as they are.

    Works on any model that takes its attention from transformers' attention interface. To see the attention weights,
    pass output_attentions=True or, where the model does not hand that on, set_attn_implementation("softmax_n_eager").
    `save_pretrained` of a stock
    class does not keep the choice: apply it again after loading, or use a class that does (RobertaSoftmaxNForMaskedLM).

    Args:
        model: a PreTrainedModel.
        n: finite real number >= 0.

    Returns:
        The same model.

    Raises:
        ValueError: n is negative, NaN or infinite, or the model (or a model inside it) does not use the attention
            interface; the model is then left as it was.
    """
    n = checked_softmax_n(n)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not parts:
        raise ValueError(f"apply_softmax_n needs a transformers model, got {type(model).__name__}")
    for part in parts:
        # The model's own promise that any function of the interface works in it.
        if not part._supports_attention_backend:
            raise ValueError(
                f"{type(part).__name__} does not take its attention from transformers' attention interface, "
                "so softmax_n cannot be put into it"
            )
    # Attention modules read the config that they were built with; composite models have several.
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        config.softmax_n = n
    model.set_attn_implementation(ATTENTION)
    return model


# ------------------------------------------------------------------------------------------------- RoBERTa with it


# Stands behind the activation's name in config.json, so that no stock class finds the activation: building the model
# raises, with this sentence, whichever attention the caller asks for.
STOP_STOCK = (
    ", in a softmax_n model: load it with AutoModelForMaskedLM.from_pretrained or another Auto class and "
    "trust_remote_code=True; stock RoBERTa would attend with softmax"
)


class RobertaSoftmaxNConfig(RobertaConfig):
    """RobertaConfig with `softmax_n`, the n of its attention (a finite real number >= 0; 1 is softmax1).

    Three things in config.json keep stock RoBERTa from loading the weights and quietly attending with softmax: the
    model_type, which makes them warn; the name of the attention, which they do not find; and `STOP_STOCK`.

    Raises:
        ValueError: softmax_n is negative, NaN or infinite.
    """

    model_type = "roberta-softmax-n"

    def __init__(self, softmax_n: float = 1.0, **kwargs):
        if isinstance(kwargs.get("hidden_act"), str):
            kwargs["hidden_act"] = kwargs["hidden_act"].removesuffix(STOP_STOCK)
        super().__init__(**kwargs)
        self.softmax_n = checked_softmax_n(softmax_n)

    @RobertaConfig._attn_implementation.getter
    def _attn_implementation(self) -> str:
        """softmax_n, whatever was asked for: every module, and every class around it, reads its attention here."""
        asked_for = getattr(self, "_attn_implementation_internal", None)
        return asked_for if asked_for in (ATTENTION, EAGER_ATTENTION) else ATTENTION

    def to_dict(self) -> dict:
        """As transformers has it, and what it leaves out: the attention, and the classes of this file beside the one
        that is being saved."""
        return {**super().to_dict(), "_attn_implementation": ATTENTION, "auto_map": dict(AUTO_MAP)}

    def to_diff_dict(self) -> dict:
        """What config.json holds."""
        return {**super().to_diff_dict(), "hidden_act": f"{self.hidden_act}{STOP_STOCK}"}


class _SoftmaxNAttention:
    """What the models below share: their attention is softmax_n with n = `config.softmax_n`, or they do not exist."""

    def __init__(self, config: RobertaSoftmaxNConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        check_attention(self)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Takes "softmax_n" and "softmax_n_eager"; ValueError for any other, which would make it a softmax model."""
        if attn_implementation not in (ATTENTION, EAGER_ATTENTION):
            raise ValueError(
                f"this model attends with softmax_n (n = {self.config.softmax_n}); "
                f"{attn_implementation!r} would silently make it a softmax model"
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless the model's self-attention, run on three tokens, gives softmax_n of the definition.

    It runs the first layer's own module, as the installed transformers has built it, on identity projections in float64
    on the CPU; so it needs no weights and draws no random numbers, in hundredths of a second. The last key is masked.
    """
    attention = next(module for module in model.modules() if isinstance(module, RobertaSelfAttention))
    size, heads, n = model.config.hidden_size, model.config.num_attention_heads, model.config.softmax_n
    on_cpu = {"dtype": torch.float64, "device": "cpu"}
    # Scores of about 1, beside which n counts.
    hidden = torch.arange(3 * size, **on_cpu).cos().mul((size // heads) ** -0.25).reshape(1, 3, size)
    mask = torch.tensor([[[[0.0, 0.0, -math.inf]]]], **on_cpu)
    identity = {
        name: torch.eye(size, **on_cpu) if parameter.dim() == 2 else torch.tensor(0.0, **on_cpu).expand(size)
        for name, parameter in attention.named_parameters()
    }
    training = attention.training
    attention.eval()
    try:
        found = torch.func.functional_call(attention, identity, (hidden, mask))[0]
    finally:
        attention.train(training)
    head = hidden.reshape(1, 3, heads, size // heads).transpose(1, 2)
    exponentials = torch.exp(head @ head.transpose(2, 3) * (size // heads) ** -0.5 + mask)
    expected = exponentials / (n + exponentials.sum(-1, keepdim=True)) @ head
    if type(found) is not Tensor:  # fake tensors, which hold no numbers to compare
        return
    error = (found - expected.transpose(1, 2).reshape(found.shape)).abs().max() / expected.abs().max()
    if not error < 1e-9:  # rounding is some 1e-16
        raise RuntimeError(
            f"the attention of {type(model).__name__} is not softmax_n with n = {n} (relative error {error:.1g}): this "
            f"release of transformers ({transformers.__version__}) does not take it from {ATTENTION!r}; use another"
        )


class RobertaSoftmaxNModel(_SoftmaxNAttention, RobertaModel):
    """RobertaModel with softmax_n attention."""

    config_class = RobertaSoftmaxNConfig


class RobertaSoftmaxNForMaskedLM(_SoftmaxNAttention, RobertaForMaskedLM):
    """RobertaForMaskedLM with softmax_n attention.

    Same modules, parameter names and initial weights (for a seed) as RobertaForMaskedLM.
    """

    config_class = RobertaSoftmaxNConfig


class RobertaSoftmaxNForSequenceClassification(_SoftmaxNAttention, RobertaForSequenceClassification):
    """RobertaForSequenceClassification with softmax_n attention, for fine-tuning."""

    config_class = RobertaSoftmaxNConfig


class RobertaSoftmaxNForTokenClassification(_SoftmaxNAttention, RobertaForTokenClassification):
    """RobertaForTokenClassification with softmax_n attention, for fine-tuning."""

    config_class = RobertaSoftmaxNConfig


MODELS = {
    AutoModel: RobertaSoftmaxNModel,
    AutoModelForMaskedLM: RobertaSoftmaxNForMaskedLM,
    AutoModelForSequenceClassification: RobertaSoftmaxNForSequenceClassification,
    AutoModelForTokenClassification: RobertaSoftmaxNForTokenClassification,
}
# Where from_pretrained(..., trust_remote_code=True) finds the classes when this project is not installed: in this
# file, which save_pretrained copies beside the weights of a class that is registered for it.
AUTO_MAP = {"AutoConfig": "softmax1.RobertaSoftmaxNConfig"} | {
    auto.__name__: f"softmax1.{model.__name__}" for auto, model in MODELS.items()
}
RobertaSoftmaxNConfig.register_for_auto_class()
for _auto, _model in MODELS.items():
    _model.register_for_auto_class(_auto.__name__)
if not __name__.startswith("transformers_modules"):  # that copy is found through config.json, not through the registry
    AutoConfig.register(RobertaSoftmaxNConfig.model_type, RobertaSoftmaxNConfig, exist_ok=True)
    for _auto, _model in MODELS.items():
        _auto.register(RobertaSoftmaxNConfig, _model, exist_ok=True)
