"""softmax1 and softmax_n attention in one self-contained file (torch and transformers only).

Evan Miller, "Attention Is Off By One" (2023), https://www.evanmiller.org/attention-is-off-by-one.html:

    softmax_n(x)_i = exp(x_i) / (n + sum_j exp(x_j))          n = 0 is softmax, n = 1 is his softmax1

With n > 0 an attention head can attend to nothing: its weights sum to less than 1. The rest, n / (n + sum exp), is its
null mass. Everything below uses one fact: softmax_n is softmax over one additional logit, log n, without the weight
that this logit gets.

    softmax_n, softmax1         the function
    softmax_n_attention         scaled dot product attention with softmax_n, exact, at the speed of PyTorch's kernels
    softmax_n_attention_varlen  the same for packed sequences: one after the other, without padding
    attention_backend           forces one implementation of it
    apply_softmax_n             puts it into a transformers model: a number n, learned sinks, or the model's own sinks
    softmax_n_class             the class of such a model, which save_pretrained and from_pretrained keep
    RobertaSoftmaxN...          the classes of RoBERTa

n is one number, or one trained number for each head, whose logarithm is called the head's attention sink.
docs/softmax_n.md has the derivations, and says which models are accepted and how they are saved. This file is copied to
the Hub with every softmax_n model, so it imports nothing of this project.

Shape legend: B batch, H query heads, G key and value heads (H is a multiple of G), L query length, S key length,
E head size, V value head size, T tokens of all packed sequences.
"""

import contextlib
import copy
import functools
import inspect
import logging
import math
import numbers
import sys
import warnings
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel, RobertaConfig
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

# The names of this attention in transformers. The eager one always computes the weights, for models that do not pass
# output_attentions on to their attention (GPT-2). The additive one always gets masks that are added to the scores, for
# models that compute with their mask (DeepSeek-V4).
ATTENTION = "softmax_n"
EAGER_ATTENTION = "softmax_n_eager"
ADDITIVE_ATTENTION = "softmax_n_additive"

# Values of config.softmax_n other than a number: the model's own sinks, or a parameter `log_n` of each attention.
OWN, LEARNED = "own", "learned"


def checked_softmax_n(n: float) -> float:
    """`n` as a float. Raises ValueError unless it is a finite real number >= 0."""
    if isinstance(n, bool) or not isinstance(n, numbers.Real) or not 0 <= n < math.inf:
        raise ValueError(f"softmax_n needs a finite real number n >= 0, got {n!r}")
    return float(n)


def _log(n: float | Tensor, log_n: float | Tensor | None) -> float | Tensor:
    """log n of whichever is given: a float, or a tensor in float32 or float64; -inf is softmax."""
    if log_n is None and not isinstance(n, Tensor):
        n = checked_softmax_n(n)
        return math.log(n) if n > 0 else -math.inf
    if log_n is None:
        n = n.to(torch.promote_types(n.dtype, torch.float32))
        zero = n == 0  # there the gradient of the logarithm is not finite
        return n.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)
    if isinstance(n, Tensor) or n != 1:
        raise ValueError("softmax_n takes n or its logarithm log_n, not both")
    if isinstance(log_n, Tensor):
        return log_n.to(torch.promote_types(log_n.dtype, torch.float32))
    if isinstance(log_n, bool) or not isinstance(log_n, numbers.Real) or not log_n < math.inf:
        raise ValueError(f"softmax_n needs a real number log_n, or -inf, got {log_n!r}")
    return float(log_n)


def _is_softmax(log_n: float | Tensor) -> bool:
    return not isinstance(log_n, Tensor) and log_n == -math.inf


# ---------------------------------------------------------------------------------------------------- the function


def softmax_n(
    input: Tensor,
    n: float | Tensor = 1.0,
    dim: int = -1,
    dtype: torch.dtype | None = None,
    *,
    log_n: float | Tensor | None = None,
) -> Tensor:
    """exp(x_i) / (n + sum_j exp(x_j)) along `dim`, with the signature of `torch.softmax` plus n.

    Exact for all logits: it is torch's softmax over one additional logit, log n, so nothing overflows. A row of -inf
    gives 0 with gradient 0 (for n > 0). n = 0 is `torch.softmax` itself, bit for bit. Half precision is computed in
    float32 and rounded once, as in torch's own kernel.

    Args:
        input: any shape, floating point (other dtypes need `dtype`).
        n: finite real number >= 0, or a tensor of such numbers of size 1 along `dim`, broadcastable to `input`.
        dim: the dimension that is normalised.
        dtype: dtype of the result; `input` is cast to it first.
        log_n: the logarithm of n, given instead of n; -inf is softmax.

    Returns:
        Tensor of the shape of `input`; sums along `dim` lie in [0, 1].

    Raises:
        ValueError: n is negative, NaN or infinite (the values of a tensor are not checked), or both n and log_n are
            given.
        TypeError: `input` is not floating point and no `dtype` is given.
    """
    log_n = _log(n, log_n)
    if _is_softmax(log_n):
        return torch.softmax(input, dim, dtype)
    x = input if dtype is None else input.to(dtype)
    if not x.is_floating_point():
        raise TypeError(f"softmax_n needs a floating point input or a floating point dtype, got {x.dtype}")
    if x.dim() == 0:
        return softmax_n(x[None], dim=dim, log_n=log_n)[0]
    scores = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = list(x.shape)
    shape[dim] = 1
    null = log_n.to(scores.dtype) if isinstance(log_n, Tensor) else scores.new_full((), log_n)
    weights = torch.softmax(torch.cat([scores, null.expand(shape)], dim), dim).narrow(dim, 0, x.shape[dim])
    return weights.to(x.dtype).contiguous()


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
    n: float | Tensor = 1.0,
    log_n: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax_n(query key^T * scale + mask) value: `F.scaled_dot_product_attention` plus n, exact for any real n >= 0.

    A row whose keys are all masked gives output 0 and gradient 0 when n > 0. Second derivatives and forward-mode
    derivatives need `with attention_backend("eager")`.

    Args:
        query: (B, H, L, E).
        key: (B, G, S, E), with G = H unless `enable_gqa`.
        value: (B, G, S, V).
        attn_mask: broadcastable to (B, H, L, S); boolean (True: the query sees the key), or floating point and added to
            the scores.
        dropout_p: dropout of the attention weights, in training and in evaluation, as in torch.
        is_causal: query i sees keys 0..i (upper left aligned); not together with `attn_mask`.
        scale: factor of the scores; default 1 / sqrt(E).
        n: finite real number >= 0; 0 is stock attention. Or a tensor (H,) or (1, H, 1, 1) of such numbers, one for each
            head, on the device of `query`. It may require a gradient, which is 0 where n is 0: to train n, give log_n.
        log_n: the logarithm of n, given instead of n: the form in which models store attention sinks. -inf is softmax.
        enable_gqa: each head of key and value serves H / G heads of query.

    Returns:
        (B, H, L, V).

    Raises:
        ValueError: n is negative, NaN or infinite (the values of a tensor are not checked), both n and log_n or both
            `attn_mask` and `is_causal` are given, the mask has an integer dtype, the shapes do not fit, or the backend
            that `attention_backend` forces cannot do this.
    """
    log_n = _log(n, log_n)
    if not _is_softmax(log_n) and is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other: put the causal mask into attn_mask")
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask is boolean, or floating point and added to the scores, got {attn_mask.dtype}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"query and key need the same size, key and value the same length, got {_shapes(query, key, value)}"
        )
    if is_causal and scale is not None and scale <= 0:  # torch's CPU kernel computes NaN: docs/softmax_n.md
        query, scale = query * scale, 1.0
    if _is_softmax(log_n):
        options = (attn_mask, dropout_p, is_causal)
        return F.scaled_dot_product_attention(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
    call = _Call(attn_mask, dropout_p, is_causal, scale, _per_head(log_n, query, -3), enable_gqa)
    query, key, value = _autocast(query, key, value)
    unsupported_inputs = None
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        unsupported_inputs = "it takes (batch, heads, length, size) without broadcasting"
    elif query.shape[1] != key.shape[1] and not enable_gqa:
        unsupported_inputs = "heads are shared without enable_gqa"
    elif not query.dtype == key.dtype == value.dtype:
        unsupported_inputs = "query, key and value have several dtypes"
    elif query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        unsupported_inputs = "a tensor is empty"
    elif attn_mask is not None and attn_mask.requires_grad:
        unsupported_inputs = "no kernel computes the mask's gradient"
    return _attend(_choose(query, key, value, call, unsupported_inputs), query, key, value, call)


def softmax_n_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    n: float | Tensor = 1.0,
    log_n: float | Tensor | None = None,
) -> Tensor:
    """softmax_n attention of packed sequences: one after the other, without padding ("variable length").

    Each sequence attends only to itself. On a GPU nothing waits for the device: `cu_seqlens` stays there.

    Args:
        query: (T, H, E), where T counts the tokens of all sequences.
        key: (T, G, E), H a multiple of G.
        value: (T, G, V).
        cu_seqlens: (number of sequences + 1) int32, on the device of `query`: sequence i is the tokens
            cu_seqlens[i] to cu_seqlens[i + 1] - 1. Starts with 0 and ends with T; sequences may be empty.
        max_seqlen: length of the longest sequence, or more.
        dropout_p, is_causal, scale, n, log_n: as in `softmax_n_attention`; n = 0 is softmax attention.

    Returns:
        (T, H, V).

    Raises:
        ValueError: as `softmax_n_attention`, or the shapes do not fit.
    """
    log_n = _log(n, log_n)
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3 or not len(query) == len(key) == len(value):
        raise ValueError(f"packed attention takes (tokens, heads, size), got {_shapes(query, key, value)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is one row of int32, got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key need the same size, got {_shapes(query, key, value)}")
    log_n = _per_head(log_n, query, 1)
    if is_causal and scale is not None and scale <= 0:
        query, scale = query * scale, 1.0
    query, key, value = _autocast(query, key, value)
    if query.numel() == 0:
        # Added, so that the result requires a gradient where an input does.
        nothing = sum(x[:0].sum() for x in (query, key, value, log_n) if isinstance(x, Tensor))
        return query.new_zeros(*query.shape[:2], value.shape[2]) + nothing
    unsupported_inputs = None if query.dtype == key.dtype == value.dtype else "query, key and value have several dtypes"
    call = _Call(None, dropout_p, is_causal, scale, log_n, True, cu_seqlens, max_seqlen)
    backend = _choose(query, key, value, call, unsupported_inputs)
    if backend in ("flash", "efficient"):
        return _stock_attention(backend, query, key, value, call)
    call = call._replace(cu_seqlens=None, max_seqlen=None)
    if cu_seqlens.is_cpu and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        # One sequence after the other: no padding, no mask, no copy. Training on 16 sentences takes half the time of
        # batches of similar length, and a quarter of the time of padding all to the longest.
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outputs = [_attend(backend, *part, call) for part in parts if part[0].numel() > 0]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)
    # Otherwise into rows of max_seqlen and back, because reading the lengths would wait for the device. A causal row
    # needs no mask: its padding comes after every real token.
    sequence, position = _sequence_and_position(cu_seqlens, len(query))
    offsets = torch.arange(max_seqlen, device=query.device)
    tokens = (cu_seqlens[:-1, None] + offsets).clamp_max(len(query) - 1)
    rows = [x[tokens].transpose(1, 2) for x in (query, key, value)]
    lengths = cu_seqlens.diff().clamp_min(1)  # because softmax of no key at all is NaN, and so is its gradient
    mask = None if is_causal else (offsets < lengths[:, None])[:, None, None]
    call = call._replace(attn_mask=mask)
    return _attend(_choose(*rows, call, unsupported_inputs), *rows, call)[sequence, :, position]


class _Call(NamedTuple):
    """The arguments of an attention beside query, key and value. It is packed if there is `cu_seqlens`."""

    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    log_n: float | Tensor  # (H,) if a tensor; -inf is softmax
    enable_gqa: bool = True
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def _per_head(log_n: float | Tensor, query: Tensor, dim: int) -> float | Tensor:
    """A tensor `log_n` as (H,), H being the size of `query` along `dim`."""
    if not isinstance(log_n, Tensor):
        return log_n
    heads = query.shape[dim] if query.dim() >= 3 else 0
    if tuple(log_n.shape) not in ((heads,), (1, heads, 1, 1)):
        raise ValueError(
            f"a tensor n holds one number for each of the {heads} heads of query, (H,) or (1, H, 1, 1), "
            f"got {tuple(log_n.shape)}"
        )
    return log_n.reshape(heads)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _sequence_and_position(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For every packed token, the number of its sequence and its position there."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return sequence, token - cu_seqlens[sequence]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast casts the arguments of stock attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


# ------------------------------------------------------------------------------------------------- choice of a backend

BACKENDS = ("auto", "cudnn", "flash", "efficient", "cpu", "zero_key", "eager")
logger = logging.getLogger(__name__)
_forced = "auto"

# The torch operators that a backend calls: {name: (positional arguments that we pass, results that we expect)}. They
# are not public, so they are checked before the first call.
_OPERATORS = {
    "cudnn": {
        "_scaled_dot_product_cudnn_attention": (8, 9),
        "_scaled_dot_product_cudnn_attention_backward": (15, 3),
    },
    "flash": {
        "_scaled_dot_product_flash_attention": (6, 9),
        "_scaled_dot_product_flash_attention_backward": (14, 3),
        "_flash_attention_forward": (10, 5),
        "_flash_attention_backward": (14, 3),
    },
    "efficient": {
        "_scaled_dot_product_efficient_attention": (7, 4),
        "_scaled_dot_product_efficient_attention_backward": (12, 4),
        "_efficient_attention_forward": (11, 6),
        "_efficient_attention_backward": (16, 4),
    },
    "cpu": {
        "_scaled_dot_product_flash_attention_for_cpu": (5, 2),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (8, 3),
    },
}

# What a backend cannot do: {need, as `_choose` names it: why}.
_NO_MASK = {
    "masked": "it takes no mask",
    "rectangular": "it aligns the causal mask differently when query and key lengths differ",
}
_LIMITS = {
    "cudnn": {
        **_NO_MASK,
        "packed": "it is called for dense attention only",
        "single": "it takes more than one query and key",
        "deterministic": "its backward pass is not deterministic",
        "wide": "it takes head sizes up to 128",
    },
    "flash": {
        **_NO_MASK,
        "very wide": "it takes head sizes up to 192 (some GPUs have no backward kernel for larger ones)",
    },
    # PyTorch's issue 115590: docs/softmax_n.md
    "efficient": {"packed dropout": "packed, its backward pass draws another dropout mask than its forward pass"},
    "cpu": {"dropout": "it has no dropout"},
}


@contextlib.contextmanager
def attention_backend(name: str):
    """Compute softmax_n attention with n > 0, and packed attention with any n, by one backend only.

    "auto" chooses; "cudnn", "flash" and "efficient" are torch's CUDA kernels, "cpu" is its CPU kernel; "zero_key" uses
    public PyTorch functions only; "eager" computes the weights. It holds for the whole process, because checkpointed
    layers run again on autograd's own threads: the backward pass belongs inside the `with` block too.

    Raises:
        ValueError: there is no such backend; later, in the attention: the backend cannot do what is asked.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"attention backend is one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _is_exporting() -> bool:
    # The value of torch.compiler.is_exporting(), which torch.compile of PyTorch 2.11 replaces by True.
    return torch.compiler._is_exporting_flag


def _choose(query: Tensor, key: Tensor, value: Tensor, call: _Call, unsupported_inputs: str | None) -> str:
    """The backend to be used. `unsupported_inputs` says why no kernel accepts the inputs."""
    if _forced == "auto" and (_is_exporting() or torch.jit.is_tracing()):
        return "zero_key"  # so that an exported model contains standard operators only
    packed, size = call.cu_seqlens is not None, max(query.shape[-1], value.shape[-1])
    needs = {
        "packed": packed,
        "masked": call.attn_mask is not None,
        "dropout": call.dropout_p > 0,
        "packed dropout": packed and call.dropout_p > 0,
        "rectangular": call.is_causal and not packed and query.shape[-2] != key.shape[-2],
        "single": query.shape[-2] == 1 or key.shape[-2] == 1,
        # Only where cuDNN could be chosen: under torch.compile the question makes a guard on the length.
        "short": _forced == "auto" and call.attn_mask is None and not (packed or query.is_cpu) and key.shape[-2] < 2048,
        "deterministic": not query.is_cpu and torch.are_deterministic_algorithms_enabled(),
        "wide": size > 128,
        "very wide": size > 192,
    }
    # Under torch.compile a need may be symbolic. A branch on it makes it a constant; bool() does not.
    needs = [name for name, needed in needs.items() if needed]
    return _constant_choice(_forced, query.device, query.dtype, unsupported_inputs, *needs)


@torch.compiler.assume_constant_result  # torch.compile calls it while tracing
def _constant_choice(*arguments) -> str:
    return _chosen(*arguments)


@functools.cache  # so that each distinct choice is logged once
def _chosen(forced: str, device: torch.device, dtype: torch.dtype, unsupported_inputs: str | None, *needs: str) -> str:
    obstacles = {name: _obstacle(name, device, dtype, unsupported_inputs, needs) for name in _OPERATORS}
    if forced == "auto":
        # For dropout without a kernel PyTorch computes the weights too: on a CPU the plain formula is faster.
        last = "eager" if device.type == "cpu" and "dropout" in needs else "zero_key"
        # On an H200 the flash kernel, which starts faster than cuDNN's, took less time below 2,048 keys.
        slower = "cudnn" if "short" in needs else None
        backend = next((name for name in _OPERATORS if name != slower and not obstacles[name]), last)
    elif obstacles.get(forced):
        raise ValueError(f"attention backend {forced!r} cannot do this: {obstacles[forced]}")
    else:
        backend = forced
    words = {"masked": ", masked", "dropout": ", with dropout"}
    kind = ("packed" if "packed" in needs else "dense") + "".join(words.get(need, "") for need in needs)
    logger.info("softmax_n attention (%s, %s on %s): backend %s", kind, dtype, device, backend)
    return backend


def _obstacle(
    backend: str, device: torch.device, dtype: torch.dtype, unsupported_inputs: str | None, needs: tuple[str, ...]
) -> str | None:
    """Why this kernel cannot be used; None if it can."""
    if device.type != ("cpu" if backend == "cpu" else "cuda") or torch.version.hip:
        return f"it does not run on {'ROCm' if torch.version.hip else device.type}"
    limits = (reason for need, reason in _LIMITS[backend].items() if need in needs)
    if limit := unsupported_inputs or next(limits, None):
        return limit
    half = dtype in (torch.float16, torch.bfloat16)
    if not half and backend != "cpu" and (backend, dtype) != ("efficient", torch.float32):
        return f"it does not take {dtype}"
    if backend == "flash":
        ampere = torch.backends.cuda.is_flash_attention_available()
        if not ampere or torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs an Ampere GPU or a newer one, and a PyTorch built with it"
    if backend == "cudnn":  # where PyTorch's own attention prefers it; before Hopper, flash is as fast
        if not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(device)[0] not in (9, 10):
            return "it needs a Hopper GPU or a Blackwell GPU of a data center, and a PyTorch built with cuDNN"
    return _changed_operator(backend)


@functools.cache  # so that there is one warning
def _changed_operator(backend: str) -> str | None:
    for name, (given, results) in _OPERATORS[backend].items():
        operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
        arguments = operator._schema.arguments if operator else []
        required = sum(not argument.has_default_value() for argument in arguments)
        accepted = sum(not argument.kwarg_only for argument in arguments)
        if not operator or not required <= given <= accepted or len(operator._schema.returns) != results:
            obstacle = f"PyTorch {torch.__version__} lacks the operator aten::{name} or has another one"
            warnings.warn(f"softmax_n attention does without its {backend!r} backend: {obstacle}", stacklevel=2)
            return obstacle
    return None


def _attend(backend: str, query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """Dense attention by one backend."""
    if backend == "zero_key":
        return _zero_key_attention(query, key, value, call)
    if backend == "eager":
        return _eager_attention(query, *_shared_heads(query, key, value, dim=-3), call)[0]
    return _stock_attention(backend, query, key, value, call)


def _bias(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor | None:
    """The mask as it is added to the scores; None without one."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.where(attn_mask, 0.0, -math.inf)


def _shared_heads(query: Tensor, key: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """key and value, repeated so that there is one head for every head of query."""
    groups = query.shape[dim] // key.shape[dim]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim), value.repeat_interleave(groups, dim)


# --------------------------------------------------------------------------------------- through PyTorch's fast kernels
#
# With o and lse the output and the log-sum-exp of the scores of ordinary softmax attention, softmax_n attention is
#
#     y = o * exp(lse - lse_n) = o * sigmoid(lse - log n),   lse_n = log(n + exp(lse))
#
# Its gradients are what the stock backward kernel computes when it gets (y, lse_n) in place of (o, lse), with dropout
# too. The gradient of log n is -sum of p0 (dy . y), with the null mass p0 = sigmoid(log n - lse), over the rows of a
# head. docs/softmax_n.md derives both.


class _StockKernel(torch.autograd.Function):
    """(y, lse, random state) of one stock kernel. Only y is differentiable, and only once.

    Dense: (B, H, L, E), bias (B, H, L, S) or None, cu_seqlens None. Packed: (T, H, E), bias None. log_n is a float, or
    (H,) in the dtype of lse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):  # not named: `apply` binds names on every call, which can take as long as the kernel
        backend, query, key, value, bias, cu_seqlens, log_n, max_seqlen, dropout_p, is_causal, scale = inputs
        aten, seqlens = torch.ops.aten, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        qkv, random = (query, key, value), ()
        if backend == "cpu":
            output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                *qkv, dropout_p, is_causal, attn_mask=bias, scale=scale
            )
        elif backend == "cudnn":
            output, lse, _, _, _, _, *random, _ = aten._scaled_dot_product_cudnn_attention(
                *qkv, None, True, dropout_p, is_causal, False, scale=scale
            )
            lse = lse.reshape(query.shape[:3])
        elif backend == "flash" and cu_seqlens is None:
            output, lse, _, _, _, _, *random, _ = aten._scaled_dot_product_flash_attention(
                *qkv, dropout_p, is_causal, False, scale=scale
            )
        elif backend == "flash":
            output, lse, *random, _ = aten._flash_attention_forward(
                *qkv, *seqlens, dropout_p, is_causal, False, scale=scale
            )
        elif cu_seqlens is None:
            output, lse, *random = aten._scaled_dot_product_efficient_attention(
                *qkv, bias, True, dropout_p, is_causal, scale=scale
            )
        else:
            qkv = [x[None] for x in qkv]
            output, lse, *random, _, _ = aten._efficient_attention_forward(
                *qkv, None, *seqlens, dropout_p, int(is_causal), True
            )
            output = output[0]
        if not _is_softmax(log_n):
            kept_mass = torch.sigmoid(_null_logit(backend, lse, log_n, query, cu_seqlens))[..., None]
            # Both compute half precision in float32 and round once. If the last operation returns its own input, as
            # mul_ does, and .to() without copy, torch.compile of PyTorch 2.11 returns zero gradients: docs/softmax_n.md
            if torch.compiler.is_compiling():
                output = (output * kept_mass).to(output.dtype, copy=True)
            else:
                output.mul_(kept_mass)
        return output, lse, *random

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.backend, *tensors, log_n, ctx.max_seqlen, ctx.dropout_p, ctx.is_causal, ctx.scale = inputs
        ctx.log_n, log_n = (None, log_n) if isinstance(log_n, Tensor) else (log_n, None)
        ctx.save_for_backward(*tensors, log_n, *outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        query, key, value, bias, cu_seqlens, log_n, output, lse, *random = ctx.saved_tensors
        aten, seqlens = torch.ops.aten, (cu_seqlens, cu_seqlens, ctx.max_seqlen, ctx.max_seqlen)
        lengths = (None, None, query.shape[2], key.shape[2])  # of dense attention
        if grad is None:
            return (None,) * 11
        grad_log_n = None
        if ctx.needs_input_grad[6]:
            null_mass = torch.sigmoid(-_null_logit(ctx.backend, lse, log_n, query, cu_seqlens))
            rows = null_mass * (grad.to(lse.dtype) * output).sum(-1)
            grad_log_n = -rows.sum([dim for dim in range(rows.dim()) if dim != 1])
        if log_n is not None:
            lse = torch.logaddexp(lse, log_n[:, None])
        elif not _is_softmax(ctx.log_n):
            lse = torch.logaddexp(lse, lse.new_full((), ctx.log_n))
        qkv, result, options = (query, key, value), (output, lse), (ctx.dropout_p, ctx.is_causal)
        if ctx.backend == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *qkv, *result, *options, attn_mask=bias, scale=ctx.scale
            )
        elif ctx.backend == "cudnn":
            if grad.stride() != output.stride():  # another layout gives wrong gradients: docs/softmax_n.md
                grad = torch.empty_like(output).copy_(grad)
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                grad, *qkv, output, lse[..., None], *random, None, *lengths, *options, scale=ctx.scale
            )
        elif ctx.backend == "flash" and cu_seqlens is None:
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, *qkv, *result, *lengths, *options, *random, scale=ctx.scale
            )
        elif ctx.backend == "flash":
            grads = aten._flash_attention_backward(grad, *qkv, *result, *seqlens, *options, *random, scale=ctx.scale)
        elif cu_seqlens is None:
            wanted = [True, True, True, False]
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, *qkv, bias, *result, *random, ctx.dropout_p, wanted, ctx.is_causal, scale=ctx.scale
            )
        else:
            grad, query, key, value, output = (x[None] for x in (grad, query, key, value, output))
            grads = aten._efficient_attention_backward(
                grad, query, key, value, None, output, *seqlens, lse, ctx.dropout_p, *random, int(ctx.is_causal), False
            )
            grads = [x[0] for x in grads[:3]]
        return None, *grads[:3], None, None, grad_log_n, *(None,) * 4


def _null_logit(backend: str, lse: Tensor, log_n: float | Tensor, query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """lse - log n for every row of the output, (B, H, L) or packed (T, H). Its sigmoid is 1 - null mass."""
    if cu_seqlens is None:
        lse = lse[..., : query.shape[2]]  # the efficient kernel rounds L up to a multiple of 32
        log_n = log_n[:, None] if isinstance(log_n, Tensor) else log_n
    elif backend == "flash":
        lse = lse.transpose(0, 1)  # (H, T)
    else:
        sequence, position = _sequence_and_position(cu_seqlens, len(query))
        lse = lse[sequence, :, position]  # (number of sequences, H, max_seqlen rounded up) before
    if isinstance(log_n, Tensor):  # for a softmax head inf: in rows without any key -inf - -inf would be NaN
        return torch.where(log_n == -math.inf, math.inf, lse - log_n)
    return lse - log_n if log_n != 0 else lse


def _stock_attention(backend: str, query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """softmax_n attention by a stock kernel, for any n >= 0. Gives the arguments the form that the kernel accepts."""
    attn_mask, dropout_p, is_causal, scale, log_n, _, cu_seqlens, max_seqlen = call
    if backend not in ("cudnn", "flash"):  # these share heads themselves
        key, value = _shared_heads(query, key, value, dim=-3 if cu_seqlens is None else -2)
    sizes = query.shape[-1], value.shape[-1]
    scale = sizes[0] ** -0.5 if scale is None else scale
    # Head sizes must be equal, and on CUDA a multiple of 8. Padding with zeros changes no score.
    multiple = 1 if backend == "cpu" else 8
    size = -(-max(sizes) // multiple) * multiple
    if backend == "efficient" and cu_seqlens is not None:
        # The packed operator is called without a scale, so with 1 / sqrt(size): if its backward operator is given one,
        # torch.compile fails (docs/softmax_n.md).
        if abs(scale * size**0.5 - 1) > 1e-9:
            query = query * (scale * size**0.5)
        max_seqlen = min(max_seqlen, len(query))  # the backward operator raises for more
    elif cu_seqlens is not None:
        max_seqlen = max(max_seqlen, 2)  # with 1 and shared heads the kernel takes a path with another layout
    query, key, value = (
        F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x if _is_aligned(x, multiple) else x.contiguous()
        for x in (query, key, value)
    )
    bias = _bias(query, key, attn_mask)
    if bias is not None:
        bias = bias.to(query.dtype).expand(*bias.shape[:-1], key.shape[2])
        if not _is_aligned(bias, multiple):
            bias = F.pad(bias, (0, multiple - bias.shape[-1] % multiple))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if isinstance(log_n, Tensor):
        log_n = log_n.to(torch.promote_types(query.dtype, torch.float32))
    run = _StockKernel.apply if torch.is_grad_enabled() else _StockKernel.forward
    if torch.compiler.is_compiling():  # which cannot trace `apply` if no input requires a gradient
        if not any(isinstance(x, Tensor) and x.requires_grad for x in (query, key, value, log_n)):
            run = _StockKernel.forward
    elif run is not _StockKernel.forward and not torch._C._are_functorch_transforms_active():
        run = super(torch.autograd.Function, _StockKernel).apply  # 50 us faster: it does not bind the arguments
    output = run(backend, query, key, value, bias, cu_seqlens, log_n, max_seqlen, dropout_p, is_causal, scale)[0]
    return output[..., : sizes[1]] if sizes[1] < size else output


def _is_aligned(x: Tensor, multiple: int) -> bool:
    """Whether the last dimension has stride 1 and the other strides are multiples of `multiple`."""
    *strides, last = x.stride()
    return last == 1 and (multiple == 1 or all(stride % multiple == 0 for stride in strides))


# -------------------------------------------------------------------------------------------- through public PyTorch


def _zero_key_attention(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """softmax_n attention through torch's public attention, exactly.

    It adds one key and value of zeros, the null key. The null key's score is its mask entry log n, which adds n to the
    denominator; its value adds nothing to the numerator. Dropout acts on all other weights as in softmax_n attention.
    """
    attn_mask, dropout_p, is_causal, scale, log_n, enable_gqa, *_ = call
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if _is_softmax(log_n):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    null_logits = _null_logits(log_n, query)
    bias = _bias(query, key, attn_mask, is_causal)
    if bias is None and (isinstance(log_n, Tensor) or log_n != 0):  # a score of log 1 = 0 needs no mask
        bias = query.new_zeros(1, key.shape[-2])
    if bias is not None:
        # Expanded first, because a mask that broadcasts over the keys must not mask the null keys.
        rows = torch.broadcast_shapes(bias.shape[:-1], null_logits[0].shape[:-1])
        bias = bias.to(query.dtype).expand(*rows, key.shape[-2])
        bias = torch.cat([bias, *(logit.expand(*rows, 1) for logit in null_logits)], -1)
    key, value = (F.pad(x, (0, 0, 0, len(null_logits))) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, bias, dropout_p, **options)


def _null_logits(log_n: float | Tensor, query: Tensor) -> list[Tensor]:
    """Logits, (1, 1) or for sinks (H, 1, 1), exact in the dtype of query, whose exponentials add up to n.

    In half precision there are two, unless n = 1: log n rounded down, and one for the rest of n. Rounding log n to
    bfloat16 alone would change n by up to 0.8 %. Both have the gradient of log n.
    """
    if not isinstance(log_n, Tensor) and log_n == 0:
        return [query.new_zeros(1, 1)]
    dtype = torch.promote_types(query.dtype, torch.float32)
    log_n = log_n[:, None, None] if isinstance(log_n, Tensor) else query.new_full((1, 1), log_n, dtype=dtype)
    # Finite, so that the output of a row without keys is 0.
    log_n = log_n.to(dtype).clamp_min(torch.finfo(query.dtype).min)
    if query.dtype == dtype:
        return [log_n]
    lower = (log_n - log_n.abs() * torch.finfo(query.dtype).eps).to(query.dtype)
    rest = log_n + torch.expm1(lower - log_n).neg().clamp_min(0).log()
    return [(log_n + (logit - log_n).detach()).to(query.dtype) for logit in (lower, rest)]


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """The definition, for callers that need the weights too. Returns (output, weights)."""
    attn_mask, dropout_p, is_causal, scale, log_n, *_ = call
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype == torch.float16:  # its largest number is 65,504: scaled first, the product of q = k = 40 is less
        scores = query * scale @ key.transpose(-2, -1)
    else:
        scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # not added: a score of inf plus -inf is NaN
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = softmax_n(scores, log_n=log_n[:, None, None] if isinstance(log_n, Tensor) else log_n)
    weights = F.dropout(weights.to(value.dtype), dropout_p)
    return weights @ value, weights


# ------------------------------------------------------------------------------------ any transformers model with it


def softmax_n_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool = False,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls, with n of `module.config.softmax_n`.

    Args:
        module: the attention module; it has `config`, and `log_n` (H,) where n is learned.
        query, key, value: (B, H, L, E), (B, G, S, E) and (B, G, S, V).
        attention_mask, dropout, scaling: `attn_mask`, `dropout_p` and `scale` of `softmax_n_attention`.
        is_causal: default is the module's; ignored beside a mask, and for a single query.
        output_attentions: return the weights too.
        cu_seq_lens_q, max_length_q: packed sequences, as transformers' FlashAttentionKwargs give them: B = 1, L all
            tokens, int32 on the device, and an int. The two arguments for keys have the same values.
        s_aux: (H,) the model's own attention sinks, log n of each head.
        indices: (B, L, any number) the keys to which a sparse attention restricts each query.

    Returns:
        Output (B, L, H, V), and the weights (B, H, L, S) after dropout, or None. Without dropout, each row of weights
        sums to 1 minus its null mass.

    Raises:
        ValueError: the config has no softmax_n; the model asks for something that is not defined here (softcap, a
            position bias beside the mask, a paged cache, sinks of its own beside n); packed sequences with
            `output_attentions` or with a cache.
    """
    n = getattr(module.config, "softmax_n", None)
    if n is None:
        raise ValueError(f"{type(module.config).__name__} has no softmax_n: choose n with apply_softmax_n(model, n)")
    for unsupported in ("softcap", "position_bias", "cache"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"softmax_n attention has no `{unsupported}`, which {type(module).__name__} asks for")
    if n == OWN:  # a layer without sinks is softmax
        log_n = -math.inf if s_aux is None else s_aux
    elif s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks of its own: take them, apply_softmax_n(model)")
    else:
        log_n = log_n_of(module)
    if indices is not None:
        allowed = torch.zeros(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = _restrict(attention_mask, allowed.scatter(-1, indices.long()[:, None], True))
    # As in transformers' sdpa attention: a causal module without a mask is causal, but a single query (a decoding
    # step) sees every key. `is_causal` comes last, so that the result is a plain bool.
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    if cu_seq_lens_q is not None:
        if output_attentions:
            raise ValueError("packed batches have no attention weights to show: use padded batches")
        if not query.shape[2] == key.shape[2] == value.shape[2]:
            raise ValueError("packed batches cannot go on from a cache: use padded batches")
        if attention_mask is None:
            rows = (x[0].transpose(0, 1) for x in (query, key, value))
            packed = (cu_seq_lens_q, max_length_q, dropout, is_causal, scaling)
            return softmax_n_attention_varlen(*rows, *packed, log_n=log_n)[None], None
        # Some decoders pass a mask too. It may not separate the sequences.
        sequence, _ = _sequence_and_position(cu_seq_lens_q, query.shape[2])
        attention_mask = _restrict(attention_mask, sequence[:, None] == sequence)
    if output_attentions:
        key, value = _shared_heads(query, key, value, dim=1)
        call = _Call(attention_mask, dropout, is_causal, scaling, _per_head(log_n, query, 1))
        output, weights = _eager_attention(query, key, value, call)
    else:
        shared = bool(query.shape[1] // key.shape[1] > 1)  # torch.jit.trace needs bool()
        options = (attention_mask, dropout, is_causal, scaling)
        output, weights = softmax_n_attention(query, key, value, *options, log_n=log_n, enable_gqa=shared), None
    output = output.transpose(1, 2)
    if _is_exporting():  # the graph needs a copy: the attention that ONNX makes of this has other strides
        return output.clone(memory_format=torch.contiguous_format), weights
    return output.contiguous(), weights


def _restrict(attention_mask: Tensor | None, allowed: Tensor) -> Tensor:
    """The mask, without the keys that are False in `allowed`."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return allowed if attention_mask is None else attention_mask & allowed
    return attention_mask.masked_fill(~allowed, -math.inf)


def log_n_of(module: nn.Module) -> float | Tensor:
    """log n of an attention module: a float, from its config's softmax_n (-inf is softmax), or learned sinks (H,)."""
    n = getattr(module.config, "softmax_n", 0.0)
    return module.log_n if n == LEARNED else _log(n, None)


def learned_sinks(model: nn.Module) -> dict[str, nn.Parameter]:
    """{parameter name: log n of the heads (H,)} of the learned sinks that this file has put into the model."""
    return {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "log_n"}


_with_weights = functools.partial(softmax_n_attention_forward, output_attentions=True)
for _name, _function, _mask in (
    (ATTENTION, softmax_n_attention_forward, sdpa_mask),
    (EAGER_ATTENTION, _with_weights, sdpa_mask),
    (ADDITIVE_ATTENTION, softmax_n_attention_forward, eager_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)  # without one transformers passes no mask at all: padding would leak


def _check_version() -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"softmax_n models need transformers 5.0 or later, found {transformers.__version__}")


def apply_softmax_n(model: nn.Module, n: float | str | None = None) -> nn.Module:
    """Make every attention of a transformers model use softmax_n, in place. The weights stay as they are.

    First the model runs on a few made-up tokens, with its own softmax attention and with ours at n = 0 (or with the
    model's own sinks). It is accepted if both outputs agree and no other attention was seen (docs/softmax_n.md). To
    get the attention weights, pass output_attentions=True to the model; a model that does not pass this on to its
    attention needs set_attn_implementation("softmax_n_eager").

    Args:
        model: a PreTrainedModel, or a module that contains one or several.
        n: finite real number >= 0, where 0 is softmax; "learned" for a parameter `log_n` (H,) in each attention module,
            which starts at 0 (n = 1) and is kept where there is one already; None for a model that has learned
            attention sinks of its own, such as gpt-oss.

    Returns:
        The same model.

    Raises:
        ValueError: n is none of these, or the model is refused; the model is then left as it was.
        ImportError: transformers is older than 5.0.
    """
    _check_version()
    n = n if n is None or n == LEARNED else checked_softmax_n(n)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inner = {module for part in parts for module in part.modules() if module is not part}
    roots = [part for part in parts if part not in inner]
    if not roots:
        raise ValueError(f"apply_softmax_n needs a transformers model, got {type(model).__name__}")
    # Configs are copied first: another model may share them, and after a failure this model gets its old ones back.
    before = _configs(model)
    copies: dict = {}
    try:
        for module, name, config in before:
            config = copy.deepcopy(config, copies)
            config.__class__ = vars(type(config)).get("stock", type(config))
            setattr(module, name, config)
        for root in roots:
            _choose_attention(root, n)
    except BaseException:
        for module, name, config in before:
            setattr(module, name, config)
        raise
    for root in roots:
        _add_sinks(root)
        _change_class(root)
    return model


def _configs(model: nn.Module) -> list[tuple[nn.Module, str, PretrainedConfig]]:
    """The configs of all modules, each with the module that holds it and the name of its attribute."""
    attributes = ((module, *attribute) for module in model.modules() for attribute in vars(module).items())
    return [attribute for attribute in attributes if isinstance(attribute[2], PretrainedConfig)]


def _set_configs(model: nn.Module, attention: str, n: float | str, heads: dict[str, int] | None = None) -> None:
    """Set what the configs say of the attention; `heads`, for learned sinks: {class of attention module: heads}."""
    for _, _, config in _configs(model):
        config.softmax_n, config._attn_implementation_internal = n, attention
        vars(config).pop("softmax_n_heads", None)
        if heads:
            config.softmax_n_heads = heads


def _choose_attention(model: PreTrainedModel, n: float | str | None) -> None:
    """Try the model out and set its configs. Raises ValueError if it is refused; its configs are then in any state."""
    kind = type(model).__name__
    no_interface = f"{kind} does not take its attention from transformers' attention interface"
    _set_configs(model, "eager", 0.0)
    if model.config._attn_implementation != "eager":  # the class of its config decides, whatever is asked for
        heads = {"RobertaSelfAttention": model.config.num_attention_heads} if n == LEARNED else None
        if n is None or (heads and not isinstance(model, _SoftmaxNModel)):
            raise ValueError(f"{kind} takes a number n, got {n!r}")
        _set_configs(model, ATTENTION, n, heads)
        return

    inputs, expected = _first_run(model)
    attention, difference, watch = ATTENTION, "", _Watch()
    for attention in (ATTENTION, ADDITIVE_ATTENTION) if inputs else ():
        _set_configs(model, attention, OWN if n is None else 0.0)
        with watch:
            difference = _difference(model, inputs, expected)
        if watch.others or not difference:
            break
    heads = {type(module).__name__: count for module, count in watch.ours.items()}
    if not inputs and not (model._supports_attention_backend and isinstance(n, float)):
        raise ValueError(f"{no_interface}, or it could not be tried: {expected}")
    if inputs and (watch.others or not watch.ours):
        raise ValueError(f"{no_interface}{watch.where(model)}, so softmax_n cannot be put into it")
    if difference:
        raise ValueError(f"softmax_n cannot be put into {kind}: with n = 0, {difference}")
    if n is None and not watch.sinks:
        raise ValueError(f"{kind} has no attention sinks of its own: give n, or {LEARNED!r}")
    if n == LEARNED and any(heads[type(module).__name__] != count for module, count in watch.ours.items()):
        raise ValueError(f"{kind} has attention of several numbers of heads: {heads}")
    _set_configs(model, attention, OWN if n is None else n, heads if n == LEARNED else None)
    for part in model.modules():  # for example the image encoder of a model that was tried with text alone
        if isinstance(part, PreTrainedModel) and watch.seen.isdisjoint(part.modules()):
            part._softmax_n_watch = _Watch()
            part.register_forward_pre_hook(_start_watching)
            part.register_forward_hook(_stop_watching, always_call=True)


def _start_watching(module: nn.Module, args: tuple) -> None:
    """Before the first forward pass of a part that did not run when n was chosen."""
    if module._softmax_n_watch is not None:
        module._softmax_n_watch.__enter__()


def _stop_watching(module: nn.Module, args: tuple, output: object) -> None:
    """After that pass. Raises ValueError if the part has an attention that stays softmax."""
    watch, module._softmax_n_watch = module._softmax_n_watch, None
    if watch is not None:
        watch.__exit__(None, None, None)
        if watch.others:
            raise ValueError(f"{type(module).__name__} attends with softmax{watch.where(module)}: it has no softmax_n")


def _first_run(model: PreTrainedModel) -> tuple[dict | None, list[Tensor] | str]:
    """Made-up inputs with which the model runs as it is, and its outputs; or None and the reason why it does not."""
    if next(model.parameters()).is_meta:
        return None, "it has no weights yet"
    reason = ""
    for everything in (False, True):
        try:
            inputs = _made_up_inputs(model, everything)
            return inputs, _run(model, inputs)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    return None, reason


def _made_up_inputs(model: PreTrainedModel, everything: bool) -> dict[str, Tensor]:
    """Two samples of the model's main input, or of every input that it can take; the second text is padded."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    vision, text = getattr(config, "vision_config", config), config.get_text_config()

    def count(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=model.device).reshape(shape)

    def floats(*shape: int) -> Tensor:
        return count(*shape).cos().to(model.dtype)

    inputs = {}
    wanted = [name for name in parameters if everything or name == model.main_input_name]
    if "input_ids" in wanted:
        inputs["input_ids"] = 5 + count(2, 8) * 7 % (text.vocab_size - 5)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = (count(2, 8) < 14).long()
    if "decoder_input_ids" in parameters and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = 5 + count(2, 4) * 7 % (config.vocab_size - 5)
    if "pixel_values" in wanted:
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
        inputs["pixel_values"] = floats(2, vision.num_channels, *size)
    if "input_features" in wanted:
        inputs["input_features"] = floats(2, config.num_mel_bins, 2 * config.max_source_positions)
    if "input_values" in wanted:
        inputs["input_values"] = floats(2, 4000)
    return inputs


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: dict) -> list[Tensor]:
    """The model's outputs with the mask and without, in eval mode, without hooks, and with fixed random numbers."""
    modes = {module: module.training for module in model.modules()}
    tables = [table for module in modes for table in (module._forward_hooks, module._forward_pre_hooks)]
    hooks = [(table, dict(table)) for table in tables]
    try:
        for module in modes:
            module.training = False
        for table, _ in hooks:
            table.clear()
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)  # some models draw random numbers in eval mode too
            outputs = [model(**inputs, return_dict=True)]
            if "attention_mask" in inputs:
                outputs.append(model(**{**inputs, "attention_mask": None}, return_dict=True))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for table, before in hooks:
            added = dict(table)  # by transformers, which would not add them again
            table.clear()
            table.update(before | added)
    return [x for output in outputs for x in output.values() if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(model: PreTrainedModel, inputs: dict, expected: list[Tensor]) -> str:
    """How its outputs differ from `expected`, where that is finite, by more than rounding may cause; "" if not."""
    try:
        outputs = _run(model, inputs)
    except ValueError:  # of softmax_n_attention_forward: it says what this model asks for
        raise
    except Exception as error:  # of a model that computes with its mask, and needs another kind of mask
        return f"it stops with {type(error).__name__}: {error}"
    largest = 0.0
    for output, exact in zip(outputs, expected, strict=True):
        finite, half = exact.isfinite(), exact.dtype.itemsize <= 2
        if finite.any():
            output, exact = output.double()[finite], exact.double()[finite]
            # Wide, because layer norms amplify rounding: 3e-5 refused a RoBERTa whose rows are nearly constant.
            allowed = exact.abs().max().clamp_min(1e-30) * (0.1 if half else 1e-3)
            largest = max(largest, ((output - exact).abs().max() / allowed).nan_to_num(math.inf).item())
    return f"its output differs by {largest:.0f} times what rounding may cause" if largest > 1 else ""


OURS = softmax_n_attention_forward.__name__  # by name, because a second copy of this file may have registered its own
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")
ATTENTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
SCORES, WEIGHTS = 1, 2  # a product of matrices, and a softmax of one


class _Watch(TorchFunctionMode):
    """Finds the attention of a model while it runs.

    ours: {module: its heads} of the modules whose attention is `softmax_n_attention_forward`.
    sinks: whether the model gave one of them sinks of its own.
    others: modules with another attention: one of torch's own, or scores, their softmax, and its product with values.
    seen: modules that computed something.
    """

    def __init__(self):
        super().__init__()
        self.ours, self.others, self.seen, self.sinks = {}, set(), set(), False
        self.found = {}  # id of a tensor: (SCORES or WEIGHTS, the tensor, kept so that no other one gets its id)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and frame.f_code.co_name != OURS and not isinstance(frame.f_locals.get("self"), nn.Module):
            frame = frame.f_back
        if frame and frame.f_code.co_name == OURS:
            self.ours[frame.f_locals["module"]] = frame.f_locals["query"].shape[1]
            self.sinks = self.sinks or frame.f_locals["s_aux"] is not None
        elif frame:
            self.seen.add(frame.f_locals["self"])
            self._follow(frame.f_locals["self"], getattr(function, "__name__", ""), args, result)
        return result

    def _follow(self, module: nn.Module, name: str, args: tuple, result: object) -> None:
        given = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg]) if id(x) in self.found]
        if name in ATTENTIONS or (name in PRODUCTS and any(self.found[id(x)][0] == WEIGHTS for x in given)):
            self.others.add(module)
        elif name in PRODUCTS:
            self.found[id(result)] = SCORES, result
        elif isinstance(result, Tensor) and name != "linear":  # scores with a mask, their softmax, a part of it, ...
            same = [x for x in given if x.numel() == result.numel() or name in ("cat", "__getitem__")]
            if same:
                stage = WEIGHTS if name == "softmax" else max(self.found[id(x)][0] for x in same)
                self.found[id(result)] = stage, result

    def where(self, model: nn.Module) -> str:
        """ " in" and the names of `others`."""
        names = [name or type(model).__name__ for name, module in model.named_modules() if module in self.others]
        return f" in {', '.join(names)}" if names else ""


# ------------------------------------------------------------------------------ models that are saved with their n

# Written behind the activation's name in config.json. No stock class knows such an activation: building the model
# raises an error that contains this sentence, whichever attention the caller asks for.
STOP_STOCK = (
    ", in a softmax_n model: load it with AutoModelForMaskedLM.from_pretrained or another Auto class and "
    "trust_remote_code=True; stock code would attend with softmax"
)


class _SoftmaxNConfig:
    """What the configs of softmax_n models share: `softmax_n`, a number n or "learned", and how they are saved.

    Three entries of config.json keep stock classes from loading the weights and attending with softmax unnoticed: the
    model_type, for which they warn; the name of the attention, which they do not know; and `STOP_STOCK`.

    Raises:
        ValueError: softmax_n is negative, NaN or infinite.
    """

    def __init__(self, softmax_n: float | str = 1.0, **kwargs):
        _check_version()
        if isinstance(kwargs.get("hidden_act"), str):
            kwargs["hidden_act"] = kwargs["hidden_act"].partition(STOP_STOCK.partition(":")[0])[0]
        if "softmax_n" in (kwargs.get("quantization_config") or {}):
            del kwargs["quantization_config"]
        super().__init__(**kwargs)
        self.softmax_n = softmax_n if softmax_n == LEARNED else checked_softmax_n(softmax_n)

    @PretrainedConfig._attn_implementation.getter
    def _attn_implementation(self) -> str:
        """The attention of every module: what was asked for if its name begins with "softmax_n", which promises that
        it reads n from the config; otherwise "softmax_n"."""
        asked_for = getattr(self, "_attn_implementation_internal", None)
        return asked_for if str(asked_for).startswith(ATTENTION) else ATTENTION

    def to_dict(self) -> dict:
        """As in transformers, and with what transformers leaves out: the attention, and all Auto classes."""
        attention = ADDITIVE_ATTENTION if self._attn_implementation == ADDITIVE_ATTENTION else ATTENTION
        return {**super().to_dict(), "_attn_implementation": attention, "auto_map": dict(self.softmax_n_auto_map)}

    def to_diff_dict(self) -> dict:
        """The content of config.json."""
        if isinstance(getattr(self, "hidden_act", None), str):
            return {**super().to_diff_dict(), "hidden_act": f"{self.hidden_act}{STOP_STOCK}"}
        # A quantization_config that names no method raises too.
        return {**super().to_diff_dict(), "quantization_config": {"softmax_n": STOP_STOCK}}


class _SoftmaxNModel:
    """What softmax_n models share: attention with n = `config.softmax_n`; construction fails otherwise."""

    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _add_sinks(self)
        self._mark()
        check_attention(self)

    def _mark(self) -> None:
        """Add the empty buffer `softmax_n`, unless n = 0: a softmax model does not load a state_dict that has it."""
        self._buffers.pop("softmax_n", None)
        if self.config.softmax_n != 0:
            self.register_buffer("softmax_n", torch.empty(0, device=self.device))
        for ignored in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            setattr(self, ignored, {r"(^|\.)softmax_n$", *(getattr(self, ignored) or ())})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if "softmax_n" in self._buffers:  # a state_dict of the stock class is accepted too
            state_dict.setdefault(f"{prefix}softmax_n", self.softmax_n)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def initialize_weights(self) -> None:
        """As in transformers; learned sinks that the saved model lacks start at 0 (n = 1)."""
        super().initialize_weights()
        for parameter in learned_sinks(self).values():
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.zeros_(parameter)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in transformers, for registered names that begin with "softmax_n", such as "softmax_n_eager".

        Raises:
            ValueError: any other name, which would make this a softmax model.
        """
        if not str(attn_implementation).startswith(ATTENTION):
            raise ValueError(
                f"this model attends with softmax_n (n = {self.config.softmax_n}); "
                f"{attn_implementation!r} would silently make it a softmax model"
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


def _add_sinks(model: PreTrainedModel) -> None:
    """Give each attention module of the classes in `config.softmax_n_heads` a parameter `log_n` (H,) of zeros, unless
    it has one, and take it from all other modules."""
    heads = model.config.softmax_n_heads if model.config.softmax_n == LEARNED else {}
    for module in model.modules():
        if type(module).__name__ not in heads:
            module._parameters.pop("log_n", None)
        elif "log_n" not in module._parameters:
            module.log_n = nn.Parameter(next(module.parameters()).new_zeros(heads[type(module).__name__]))


def _change_class(model: PreTrainedModel) -> None:
    """Give the model the class that is saved with its n; for softmax, and for a model's own sinks, its stock class."""
    if not model.config._attn_implementation.startswith(ATTENTION):  # its config decides for another attention
        return
    if not isinstance(model.config, RobertaSoftmaxNConfig):  # which serves every n
        model._buffers.pop("softmax_n", None)
        model.__class__ = vars(type(model)).get("stock", type(model))
        if model.config.softmax_n not in (0, OWN):
            model.__class__ = softmax_n_class(type(model))
            model.config.__class__ = model.config_class
    if isinstance(model, _SoftmaxNModel):
        model._mark()


@functools.cache
def softmax_n_class(stock: type) -> type:
    """The class that is `stock`, a class of transformers models or configs, with softmax_n.

    That of LlamaForCausalLM is SoftmaxNLlamaForCausalLM. It is an attribute of this module too, where from_pretrained
    with trust_remote_code=True finds it.
    """
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with softmax_n.", "stock": stock}
    if issubclass(stock, PretrainedConfig):
        base, autos = _SoftmaxNConfig, {"AutoConfig": f"softmax1.SoftmaxN{stock.__name__}"}
        for auto in (name for name in dir(transformers) if name.startswith("AutoModel")):
            mapping = getattr(getattr(transformers, auto), "_model_mapping", ())
            if stock in mapping and isinstance(mapping[stock], type):
                autos[auto] = f"softmax1.SoftmaxN{mapping[stock].__name__}"
        about |= {"model_type": f"softmax-n-{stock.model_type}", "softmax_n_auto_map": autos}
        about["_auto_class"] = "AutoConfig"
        about["__init__"] = lambda self, *args, **kwargs: _SoftmaxNConfig.__init__(self, *args, **kwargs)
    else:
        base, about["config_class"] = _SoftmaxNModel, softmax_n_class(stock.config_class)
        autos = {name: auto for auto, name in reversed(about["config_class"].softmax_n_auto_map.items())}
        about["_auto_class"] = autos.get(f"softmax1.SoftmaxN{stock.__name__}", "AutoModel")
    return type(f"SoftmaxN{stock.__name__}", (base, stock), about)


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix("SoftmaxN"), None) if name.startswith("SoftmaxN") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return softmax_n_class(stock)


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless RoBERTa's self-attention, run on three tokens, equals the definition of softmax_n.

    The first layer's own module runs, as the installed transformers has built it, with identity projections in float64
    on the CPU: this needs no weights, draws no random numbers and takes hundredths of a second. The last key is masked.
    """
    attention = next((module for module in model.modules() if isinstance(module, RobertaSelfAttention)), None)
    if not attention:
        return
    size, heads, n = model.config.hidden_size, model.config.num_attention_heads, model.config.softmax_n
    n = 1.0 if n == LEARNED else n  # zero projections below make its log_n 0
    on_cpu = {"dtype": torch.float64, "device": "cpu"}
    # Scores of about 1, so that n changes the result.
    hidden = torch.arange(3 * size, **on_cpu).cos().mul((size // heads) ** -0.25).reshape(1, 3, size)
    mask = torch.tensor([[[[0.0, 0.0, -math.inf]]]], **on_cpu)
    identity = {
        name: torch.eye(size, **on_cpu) if parameter.dim() == 2 else torch.zeros(len(parameter), **on_cpu)
        for name, parameter in attention.named_parameters()
    }
    training = attention.training
    attention.eval()
    try:
        output = torch.func.functional_call(attention, identity, (hidden, mask))[0]
    finally:
        attention.train(training)
    if type(output) is not Tensor:  # fake tensors, which hold no numbers to compare
        return
    head = hidden.reshape(1, 3, heads, size // heads).transpose(1, 2)
    expected = softmax_n(head @ head.transpose(2, 3) * (size // heads) ** -0.5 + mask, n) @ head
    error = (output - expected.transpose(1, 2).reshape(output.shape)).abs().max() / expected.abs().max()
    if not error < 1e-9:  # rounding is about 1e-16
        raise RuntimeError(
            f"the attention of {type(model).__name__} is not softmax_n with n = {n} (relative error {error:.1g}): this "
            f"release of transformers ({transformers.__version__}) does not take it from {ATTENTION!r}; use another"
        )


# ----------------------------------------------------------------------------------------------------------- RoBERTa


class RobertaSoftmaxNConfig(_SoftmaxNConfig, RobertaConfig):
    """RobertaConfig with `softmax_n`, the n of its attention: a finite real number >= 0 (1 is softmax1), or "learned".

    Raises:
        ValueError: softmax_n is negative, NaN or infinite.
    """

    model_type = "roberta-softmax-n"
    # For from_pretrained(..., trust_remote_code=True) without this project: save_pretrained copies this file beside the
    # weights. `_roberta` adds the classes of models.
    softmax_n_auto_map: ClassVar = {"AutoConfig": "softmax1.RobertaSoftmaxNConfig"}

    def __init__(self, softmax_n: float | str = 1.0, **kwargs):
        super().__init__(softmax_n, **kwargs)
        if self.softmax_n == LEARNED:
            self.softmax_n_heads = {"RobertaSelfAttention": self.num_attention_heads}


RobertaSoftmaxNConfig.register_for_auto_class()
MODELS: dict[type, type] = {}  # {Auto class: class of RoBERTa with softmax_n}


def _roberta(head: str) -> type:
    """RoBERTa with softmax_n; modules, parameter names and (for a seed) initial weights as in the stock class."""
    stock, auto = (getattr(transformers, name) for name in (f"Roberta{head}", f"AutoModel{head.removeprefix('Model')}"))
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with softmax_n."}
    about["config_class"] = RobertaSoftmaxNConfig
    model = type(f"RobertaSoftmaxN{head}", (_SoftmaxNModel, stock), about)
    model.register_for_auto_class(auto.__name__)
    RobertaSoftmaxNConfig.softmax_n_auto_map[auto.__name__] = f"softmax1.{model.__name__}"
    MODELS[auto] = model
    return model


RobertaSoftmaxNModel = _roberta("Model")
RobertaSoftmaxNForMaskedLM = _roberta("ForMaskedLM")
RobertaSoftmaxNForCausalLM = _roberta("ForCausalLM")
RobertaSoftmaxNForSequenceClassification = _roberta("ForSequenceClassification")
RobertaSoftmaxNForTokenClassification = _roberta("ForTokenClassification")
RobertaSoftmaxNForQuestionAnswering = _roberta("ForQuestionAnswering")
RobertaSoftmaxNForMultipleChoice = _roberta("ForMultipleChoice")

if not __name__.startswith("transformers_modules"):  # transformers finds the classes of such a copy in config.json
    transformers.AutoConfig.register(RobertaSoftmaxNConfig.model_type, RobertaSoftmaxNConfig, exist_ok=True)
    for _auto, _model in MODELS.items():
        _auto.register(RobertaSoftmaxNConfig, _model, exist_ok=True)
