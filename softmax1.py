"""softmax1 and softmax_n attention in one self-contained file (torch and transformers only).

Evan Miller, "Attention Is Off By One" (2023), https://www.evanmiller.org/attention-is-off-by-one.html:

    softmax_n(x)_i = exp(x_i) / (n + sum_j exp(x_j))          n = 0 is softmax, n = 1 is his softmax1

An attention head with n > 0 may attend to nothing: its weights sum to less than 1, and the rest, n / (n + sum exp), is
the null mass. softmax_n is softmax over one more logit of value log n whose weight is thrown away; everything below
rests on that.

    softmax_n, softmax1        the function
    softmax_n_attention        scaled dot product attention with it, exact at the speed of torch's own kernels
    softmax_n_attention_varlen the same for sequences packed one behind the other, without padding
    attention_backend          forces the kernel that computes it
    apply_softmax_n            puts it into a transformers model: a number, learned sinks, or the sinks that it has
    softmax_n_class            the class of such a model, which keeps n through save_pretrained and from_pretrained
    RobertaSoftmaxN...         those of RoBERTa

n is a number, or a trained one for each head, whose logarithm is known as the head's attention sink. Derivations, and
which models are taken and how they are saved: docs/softmax_n.md. The file is copied to the Hub with every softmax_n
model, so it imports nothing of this project.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel, RobertaConfig
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

# The names under which transformers knows this attention. The eager one materialises the weights on every call, for
# models that do not hand the keyword output_attentions down to their attention (GPT-2). The additive one gets masks
# that are added to the scores, always, for models that compute with their mask (DeepSeek-V4).
ATTENTION = "softmax_n"
EAGER_ATTENTION = "softmax_n_eager"
ADDITIVE_ATTENTION = "softmax_n_additive"

# What config.softmax_n may be beside a number: the model's own sinks, or a parameter of each head, `log_n`.
OWN, LEARNED = "own", "learned"


def checked_softmax_n(n: float) -> float:
    """`n` as a float. Raises ValueError unless it is a finite real number >= 0."""
    if isinstance(n, bool) or not isinstance(n, numbers.Real) or not 0 <= n < math.inf:
        raise ValueError(f"softmax_n needs a finite real number n >= 0, got {n!r}")
    return float(n)


def _log(n: float | Tensor, log_n: float | Tensor | None) -> float | Tensor:
    """log n, of whichever of the two was given: a float, or a tensor in float32 at least; -inf is softmax."""
    if log_n is None and not isinstance(n, Tensor):
        n = checked_softmax_n(n)
        return math.log(n) if n > 0 else -math.inf
    if log_n is None:
        n = n.to(torch.promote_types(n.dtype, torch.float32))
        zero = n == 0  # kept out of the logarithm, whose gradient there is not finite
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

    Exact at any logits: the row is shifted by max(max_j x_j, log n), so nothing overflows and a row far below log n
    goes to 0 smoothly; a row of -inf gives 0 with gradient 0 (for n > 0). n = 0 is `torch.softmax` itself, bit for bit.
    Half precision is computed in float32 and rounded once, as torch's own kernel does.

    Args:
        input: any shape, floating point (other dtypes need `dtype`).
        n: finite real number >= 0, or a tensor of them that broadcasts with `input`, of size 1 along `dim`.
        dim: the dimension that is normalised.
        dtype: dtype of the result; `input` is cast to it first.
        log_n: the logarithm of n, in its place; -inf is softmax.

    Returns:
        Tensor of the shape of `input`; sums along `dim` lie in [0, 1].

    Raises:
        ValueError: n is a number and negative, NaN or infinite, or both n and log_n are given.
        TypeError: `input` is not floating point and no `dtype` is given.
    """
    log_n = _log(n, log_n)
    if _is_softmax(log_n):
        return torch.softmax(input, dim, dtype)
    x = input if dtype is None else input.to(dtype)
    if not x.is_floating_point():
        raise TypeError(f"softmax_n needs a floating point input or a floating point dtype, got {x.dtype}")
    result_dtype = x.dtype
    x = x.to(torch.promote_types(result_dtype, torch.float32))
    if x.numel() == 0:
        return x.to(result_dtype)
    # The shift cancels, so no gradient needs to pass through it.
    shift = x.detach().amax(dim, keepdim=True)
    shift = shift.clamp_min(log_n.detach() if isinstance(log_n, Tensor) else log_n)
    exponentials = torch.exp(x - shift)
    null = torch.exp(log_n - shift)
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
    n: float | Tensor = 1.0,
    log_n: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax_n(query key^T * scale + mask) value: `F.scaled_dot_product_attention` plus n, and exact for any real n.

    A row in which every key is masked gives output 0 and gradient 0 when n > 0. Forward-mode derivatives and second
    ones exist only where the weights are materialised: `with attention_backend("eager")`.

    Args:
        query: (B, H, L, E).
        key: (B, G, S, E), with G = H unless `enable_gqa`.
        value: (B, G, S, V).
        attn_mask: broadcastable to (B, H, L, S); boolean (True takes part) or floating point, added to the scores.
        dropout_p: dropout of the attention weights; applied whatever the module's mode, as in torch.
        is_causal: query i sees keys 0..i (upper left aligned); not together with `attn_mask`.
        scale: factor of the scores; default 1 / sqrt(E).
        n: finite real number >= 0; 0 is stock attention. Or a tensor of them, (H,) or (1, H, 1, 1), one for each head
            and on the device; it may require a gradient (which is 0 where n is 0: train log_n).
        log_n: the logarithm of n, in its place: the form in which models store attention sinks. -inf is softmax.
        enable_gqa: heads of key and value are shared by H / G query heads each.

    Returns:
        (B, H, L, V).

    Raises:
        ValueError: n is a number and negative, NaN or infinite, both n and log_n or both `attn_mask` and `is_causal`
            are given, the mask holds whole numbers, the shapes do not fit, or the backend that `attention_backend`
            forces cannot do this.
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
    if is_causal and scale is not None and scale <= 0:  # NaN, or worse, in torch's CPU kernel: docs/softmax_n.md
        query, scale = query * scale, 1.0
    call = _Call(attn_mask, dropout_p, is_causal, scale, _per_head(log_n, query, -3), enable_gqa)
    if _is_softmax(log_n):
        return _sdpa(query, key, value, call)
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
    backend = _choose(
        query,
        unsupported_inputs,
        masked=attn_mask is not None,
        dropout=dropout_p > 0,
        rectangular=is_causal and query.shape[-2] != key.shape[-2],
        wide=max(query.shape[-1], value.shape[-1]) > 192,
        one_more_key=attn_mask is None and not is_causal and not isinstance(log_n, Tensor) and log_n == 0,
    )
    return _attend(backend, query, key, value, call)


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
    """softmax_n attention of sequences packed one behind the other ("variable length", padding-free).

    Every sequence attends to itself alone. Nothing waits for the device: `cu_seqlens` stays on it.

    Args:
        query: (T, H, E), T being the tokens of all sequences together.
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
        # It keeps what asks for a gradient.
        nothing = sum(x[:0].sum() for x in (query, key, value, log_n) if isinstance(x, Tensor))
        return query.new_zeros(*query.shape[:2], value.shape[2]) + nothing
    unsupported_inputs = None if query.dtype == key.dtype == value.dtype else "query, key and value have several dtypes"
    wide = max(query.shape[-1], value.shape[-1]) > 192
    backend = _choose(query, unsupported_inputs, dropout=dropout_p > 0, packed=True, wide=wide)
    call = _Call(None, dropout_p, is_causal, scale, log_n)
    if backend in ("flash", "efficient"):
        return _stock_attention(backend, query, key, value, call._replace(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))
    if cu_seqlens.is_cpu and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        # One sequence after the other: no padding, no mask, no copy. For training on 16 sentences this takes half the
        # time of batches of similar length and a quarter of that of padding all to the longest.
        lengths = cu_seqlens.diff().tolist()
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        outputs = [_attend(backend, *part, call) for part in parts if part[0].numel() > 0]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)
    # Elsewhere the lengths are not known without waiting for the device: into rows of max_seqlen and back. Causal needs
    # no mask, since padding lies behind every real token.
    sequence, position = _sequence_and_position(cu_seqlens, len(query))
    offsets = torch.arange(max_seqlen, device=query.device)
    tokens = (cu_seqlens[:-1, None] + offsets).clamp_max(len(query) - 1)
    rows = [x[tokens].transpose(1, 2) for x in (query, key, value)]
    lengths = cu_seqlens.diff().clamp_min(1)  # a row without any key would be NaN in softmax, and poison its gradient
    mask = None if is_causal else (offsets < lengths[:, None])[:, None, None]
    call = _Call(mask, dropout_p, is_causal, scale, log_n)
    backend = _choose(query, unsupported_inputs, masked=mask is not None, dropout=dropout_p > 0, wide=wide)
    return _attend(backend, *rows, call)[sequence, :, position]


class _Call(NamedTuple):
    """What an attention is to compute, beside query, key and value. Packed, where there is `cu_seqlens`."""

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
    """Sequence and position in it of every packed token."""
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return sequence, token - cu_seqlens[sequence]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the arguments of stock attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


# ------------------------------------------------------------------------------------------------ which backend does it

BACKENDS = ("auto", "flash", "efficient", "cpu", "zero_key", "eager")
logger = logging.getLogger(__name__)
_forced = "auto"

# The operators of torch that a backend calls, each with how many positional arguments we give it and how many results
# we expect. They are not public: a PyTorch with other ones is found out before the first call.
_OPERATORS = {
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


@contextlib.contextmanager
def attention_backend(name: str):
    """Force softmax_n attention with n > 0, and packed attention with any n, onto one backend.

    "auto" chooses; "flash" and "efficient" are torch's CUDA kernels, "cpu" is its CPU kernel; "zero_key" is public
    PyTorch only; "eager" materialises the weights. For the whole process, since checkpointed layers run again on
    autograd's own threads: keep the backward pass inside too.

    Raises:
        ValueError: no such backend; later, in the attention, when the backend cannot do what is asked.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"attention backend is one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class _Need(NamedTuple):
    """What decides between the backends."""

    device: torch.device
    dtype: torch.dtype
    unsupported_inputs: str | None  # what no kernel takes, in words
    masked: bool
    dropout: bool
    packed: bool
    rectangular: bool  # causal with L != S
    wide: bool  # a head size over 192
    one_more_key: bool  # n = 1 without a mask, for which the zero key needs none either


_FLAGS = _Need._fields[3:]


def _is_exporting() -> bool:
    # What torch.compiler.is_exporting() returns; torch.compile of PyTorch 2.11 takes that call for true.
    return torch.compiler._is_exporting_flag


def _choose(query: Tensor, unsupported_inputs: str | None, **flags: bool) -> str:
    """The backend for this need; flags of `_Need` that are not given are False."""
    if _forced == "auto" and (_is_exporting() or torch.jit.is_tracing()):
        return "zero_key"  # so that an exported model holds standard operators only
    # Under torch.compile a flag may be symbolic; branching on it, which bool() would not do, makes it a constant.
    flags = [True if flags.get(name, False) else False for name in _FLAGS]
    return _constant_choice(_forced, query.device, query.dtype, unsupported_inputs, *flags)


@torch.compiler.assume_constant_result  # torch.compile calls it while it traces
def _constant_choice(*need) -> str:
    return _chosen(*need)


@functools.cache  # so that each distinct choice is logged once, and costs nothing afterwards
def _chosen(forced: str, *need) -> str:
    need = _Need(*need)  # here, and not in `_choose`, where torch.compile would not see a constant
    obstacles = {name: _obstacle(name, need) for name in BACKENDS[1:]}
    if forced == "auto":
        # Without a kernel, dropout has the weights materialised: on a CPU the plain formula does it faster.
        last = "eager" if need.device.type == "cpu" and need.dropout else "zero_key"
        backend = next((name for name in _OPERATORS if not obstacles[name]), last)
        # From Hopper on, PyTorch's own attention prefers cuDNN, which was faster on an H200 (docs/h200/README.md).
        if backend == "flash" and need.one_more_key and torch.cuda.get_device_capability(need.device) >= (9, 0):
            backend = "zero_key"
    elif obstacles[forced]:
        raise ValueError(f"attention backend {forced!r} cannot do this: {obstacles[forced]}")
    else:
        backend = forced
    kind = f"{'packed' if need.packed else 'dense'}{', masked' * need.masked}{', with dropout' * need.dropout}"
    logger.info("softmax_n attention (%s, %s on %s): backend %s", kind, need.dtype, need.device, backend)
    return backend


def _obstacle(backend: str, need: _Need) -> str | None:
    """Why `backend` cannot do this; None if it can."""
    if backend not in _OPERATORS:
        return None
    half = need.dtype in (torch.float16, torch.bfloat16)
    if need.device.type != ("cpu" if backend == "cpu" else "cuda") or torch.version.hip:
        return f"it does not run on {'ROCm' if torch.version.hip else need.device.type}"
    if need.unsupported_inputs:
        return need.unsupported_inputs
    if backend == "cpu" and need.dropout:
        return "it has no dropout"
    if backend == "efficient" and not (half or need.dtype == torch.float32):
        return f"it does not take {need.dtype}"
    if backend == "efficient" and need.packed and need.dropout:
        # https://github.com/pytorch/pytorch/issues/115590: forward, all heads and sequences share one mask.
        return "packed, its backward pass draws another dropout mask than its forward pass"
    if backend == "flash":
        if not half:
            return f"it takes half precision, not {need.dtype}"
        if need.masked:
            return "it takes no mask"
        if need.rectangular:
            return "it aligns the causal mask differently when query and key lengths differ"
        if need.wide:
            return "it takes head sizes up to 192 (beyond, not every card has its backward)"
        ampere = torch.backends.cuda.is_flash_attention_available()
        if not ampere or torch.cuda.get_device_capability(need.device) < (8, 0):
            return "it needs an Ampere GPU or a newer one, and a PyTorch built with it"
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


def _sdpa(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """Stock attention, which knows no n."""
    options = {"scale": call.scale, "enable_gqa": call.enable_gqa}
    return F.scaled_dot_product_attention(query, key, value, *call[:3], **options)


def _shared_heads(query: Tensor, key: Tensor, value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """key and value with a head for every head of query."""
    groups = query.shape[dim] // key.shape[dim]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim), value.repeat_interleave(groups, dim)


# ---------------------------------------------------------------------------------- through torch's own fast kernels
#
# With o and lse the output and the log-sum-exp of the scores of ordinary softmax attention,
#
#     lse_n = log(n + exp(lse))                  that of softmax_n attention, logaddexp(lse, log n)
#     y = o * exp(lse - lse_n)                   = o * sigmoid(lse - log n), its output
#
# and its gradients are those that the stock backward kernel computes when it is given (y, lse_n) for (o, lse): the
# kernel rebuilds the weights as P = exp(scores - lse_n), which are softmax_n's own, and
#
#     dP = dy value^T,   dS = P * (dP - delta),   delta = sum_j P_j dP_j = dy . y
#
# is the Jacobian of softmax_n as well as softmax's (Dao, "FlashAttention-2", 2023, section 3.1). Dropout multiplies P
# with the same mask in y, in dP and in dV, so all of it holds with dropout too. Nothing passes through lse.
#
# Of n a row has the null mass p0 = n / (n + exp(lse)) = sigmoid(log n - lse), and dP_j / dlog n = -P_j p0 for each j.
# So dy / dlog n = -p0 y, and the gradient of a head's log n is -sum over its rows of p0 (dy . y), in float32 at least.


class _StockKernel(torch.autograd.Function):
    """(y, lse, random state) of one stock kernel. Only y is differentiable, and only once.

    Dense: (B, H, L, E), bias (B, H, L, S) or None, cu_seqlens None. Packed: (T, H, E), bias None. log_n is a float, or
    (H,) in the dtype of lse.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):  # named ones would cost as much as the kernel: `apply` binds them anew on every call
        backend, query, key, value, bias, cu_seqlens, log_n, max_seqlen, dropout_p, is_causal, scale = inputs
        aten, seqlens = torch.ops.aten, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        qkv, random = (query, key, value), ()
        if backend == "cpu":
            output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                *qkv, dropout_p, is_causal, attn_mask=bias, scale=scale
            )
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
            share = torch.sigmoid(_null_logit(backend, lse, log_n, query, cu_seqlens))[..., None]
            # Half precision is computed in float32, rounded once. PyTorch 2.11's torch.compile returns zero gradients
            # where the last operation returns its own input, as mul_ does, or a .to() without effect.
            if torch.compiler.is_compiling():
                output = (output * share).to(output.dtype, copy=True)
            else:
                output.mul_(share)
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
        elif ctx.backend == "flash" and cu_seqlens is None:
            lengths = (None, None, query.shape[2], key.shape[2])
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
    """lse - log n, the logit of 1 - null mass, of every row of the output: dense (B, H, L), packed (T, H)."""
    if cu_seqlens is None:
        lse = lse[..., : query.shape[2]]  # the efficient kernel rounds L up to a multiple of 32
        log_n = log_n[:, None] if isinstance(log_n, Tensor) else log_n
    elif backend == "flash":
        lse = lse.transpose(0, 1)  # (H, T)
    else:
        sequence, position = _sequence_and_position(cu_seqlens, len(query))
        lse = lse[sequence, :, position]  # of (number of sequences, H, max_seqlen rounded up)
    if isinstance(log_n, Tensor):  # a softmax head stays one in rows without any key, where -inf - -inf is NaN
        return torch.where(log_n == -math.inf, math.inf, lse - log_n)
    return lse - log_n if log_n != 0 else lse


def _stock_attention(backend: str, query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """softmax_n attention by a stock kernel, for any n >= 0: makes the arguments such as the kernel takes them."""
    attn_mask, dropout_p, is_causal, scale, log_n, _, cu_seqlens, max_seqlen = call
    if backend != "flash":  # which alone knows shared heads
        key, value = _shared_heads(query, key, value, dim=-3 if cu_seqlens is None else -2)
    sizes = query.shape[-1], value.shape[-1]
    scale = sizes[0] ** -0.5 if scale is None else scale
    # Head sizes: equal, and on CUDA a multiple of 8. Zeros change no score, and their outputs are cut off.
    multiple = 1 if backend == "cpu" else 8
    size = -(-max(sizes) // multiple) * multiple
    if backend == "efficient" and cu_seqlens is not None:
        # Packed, it is called without a scale, which is 1 / sqrt(size): the shape rule of its backward, which
        # torch.compile asks, knows one argument less than the operator and fails when given one (torch 2.13 still).
        if abs(scale * size**0.5 - 1) > 1e-9:
            query = query * (scale * size**0.5)
        max_seqlen = min(max_seqlen, len(query))  # its backward refuses more
    elif cu_seqlens is not None:
        max_seqlen = max(max_seqlen, 2)  # for 1 and shared heads it has a decoding path with another layout
    query, key, value = (
        F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x if _is_aligned(x, multiple) else x.contiguous()
        for x in (query, key, value)
    )
    bias = None
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, -math.inf) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.to(query.dtype).expand(*bias.shape[:-1], key.shape[2])
        if not _is_aligned(bias, multiple):
            bias = F.pad(bias, (0, multiple - bias.shape[-1] % multiple))[..., : bias.shape[-1]]
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if isinstance(log_n, Tensor):
        log_n = log_n.to(torch.promote_types(query.dtype, torch.float32))
    with_gradient = torch.is_grad_enabled()
    if torch.compiler.is_compiling():  # torch.compile cannot trace `apply` where no input needs a gradient
        inputs = (query, key, value, log_n)
        with_gradient = with_gradient and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    run = _StockKernel.apply if with_gradient else _StockKernel.forward
    output = run(backend, query, key, value, bias, cu_seqlens, log_n, max_seqlen, dropout_p, is_causal, scale)[0]
    return output[..., : sizes[1]] if sizes[1] < size else output


def _is_aligned(x: Tensor, multiple: int) -> bool:
    """Whether the last dimension lies dense in memory and the other strides are multiples of `multiple`."""
    *strides, last = x.stride()
    return last == 1 and all(stride % multiple == 0 for stride in strides)


# -------------------------------------------------------------------------------------------- through public PyTorch


def _zero_key_attention(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """softmax_n attention through torch's public attention, exactly.

    One more key and value of zeros: the null key's score is 0 plus its mask entry log n, so it adds n to the
    denominator, and its value adds nothing to the numerator. Dropout may drop the null key, which changes nothing, and
    treats every other weight as softmax_n attention does.
    """
    attn_mask, _, is_causal, _, log_n, *_ = call
    if _is_softmax(log_n):
        return _sdpa(query, key, value, call)
    length, keys = query.shape[-2], key.shape[-2]
    null_logits = _null_logits(log_n, query.dtype)
    key = F.pad(key, (0, 0, 0, len(null_logits)))
    value = F.pad(value, (0, 0, 0, len(null_logits)))
    by_head, plain = isinstance(log_n, Tensor), not isinstance(log_n, Tensor) and log_n == 0
    if is_causal:
        attn_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None and not plain:  # log 1 = 0 needs no mask
        attn_mask = query.new_zeros(1, keys)
    if attn_mask is not None:
        if not plain and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        # Expanded first: a mask that broadcasts over the keys must not reach the null keys.
        rows = torch.broadcast_shapes(attn_mask.shape[:-1], (query.shape[-3], 1)) if by_head else attn_mask.shape[:-1]
        attn_mask = attn_mask.expand(*rows, keys)
        for logit in null_logits:
            if by_head:
                null = logit.to(query.dtype)[:, None, None].expand(*rows, 1)
                attn_mask = torch.cat([attn_mask, null], -1)
            else:
                attn_mask = F.pad(attn_mask, (0, 1), value=True if attn_mask.dtype == torch.bool else logit)
    return _sdpa(query, key, value, call._replace(attn_mask=attn_mask, is_causal=False))


def _null_logits(log_n: float | Tensor, dtype: torch.dtype) -> list[float] | list[Tensor]:
    """Logits, exact in `dtype`, whose exponentials add up to n.

    One is enough except in half precision, where log n rounded to bfloat16 would be another n by up to 0.8 %. There the
    first is log n rounded down, and a second one makes up the rest.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if isinstance(log_n, Tensor):
        log_n = log_n.to(torch.promote_types(dtype, torch.float32))
        log_n = log_n.clamp_min(torch.finfo(dtype).min)  # finite, so that a row without any key is 0
        if not half:
            return [log_n]
        lower = (log_n - log_n.abs() * torch.finfo(dtype).eps).to(dtype)
        rest = log_n + torch.expm1(lower - log_n).neg().clamp_min(0).log()
        return [log_n + (logit - log_n).detach() for logit in (lower, rest)]  # both move with log n
    if not half:
        return [log_n]
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))  # of the significand: 11 or 8
    significand, exponent = math.frexp(log_n)
    rounded = math.ldexp(math.floor(math.ldexp(significand, bits)), exponent - bits)
    rest = math.exp(log_n) - math.exp(rounded)
    return [rounded] if rest <= 0 else [rounded, math.log(rest)]


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """The definition, with the weights materialised, for callers that need them. Returns (output, weights).

    Softmax over one more logit, log n, whose weight is thrown away, keeps to torch's fused softmax and its backward.
    """
    attn_mask, dropout_p, is_causal, scale, log_n, *_ = call
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype == torch.float16:  # which ends at 65,504: scaled first, the product of q = k = 40 does not overflow
        scores = query * scale @ key.transpose(-2, -1)
    else:
        scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if isinstance(log_n, Tensor):
        null = log_n.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, null], -1), -1)[..., :-1]
    elif _is_softmax(log_n):
        weights = torch.softmax(scores, -1)
    else:
        weights = torch.softmax(F.pad(scores, (0, 1), value=log_n), -1)[..., :-1]
    weights = F.dropout(weights.to(value.dtype), dropout_p)
    return weights @ value, weights


# ------------------------------------------------------------------------------------- any transformers model with it


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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; n comes from `module.config.softmax_n`.

    Args and result as transformers' `AttentionInterface` has them: query (B, H, L, E), key and value (B, G, S, E),
    result (B, L, H, E) and, with `output_attentions`, the weights (B, H, L, S), after dropout as in stock eager
    attention. Their rows sum to 1 minus the null mass. `s_aux` (H,) are a model's own sinks, log n of each head;
    `indices` (B, L, any) the keys to which a sparse attention has confined each query.

    Packed sequences come as transformers' FlashAttentionKwargs: B = 1, L all tokens, `cu_seq_lens_q` int32 on the
    device and `max_length_q` an int; the two for keys are the same.

    Raises:
        ValueError: the config carries no softmax_n, or the model asks for something that softmax_n attention does not
            define here (softcap, a position bias beside the mask, a paged cache, sinks of its own beside n); packed
            sequences with `output_attentions` or a cache.
    """
    n = getattr(module.config, "softmax_n", None)
    if n is None:
        raise ValueError(f"{type(module.config).__name__} has no softmax_n: choose n with apply_softmax_n(model, n)")
    for unsupported in ("softcap", "position_bias", "cache"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"softmax_n attention has no `{unsupported}`, which {type(module).__name__} asks for")
    if n == OWN:  # some layers may have none, and are softmax
        log_n = -math.inf if s_aux is None else s_aux
    elif s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks of its own: take them, apply_softmax_n(model)")
    else:
        log_n = log_n_of(module)
    if indices is not None:
        chosen = torch.zeros(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, indices.long()[:, None], True)
        if attention_mask is None or attention_mask.dtype == torch.bool:
            attention_mask = chosen if attention_mask is None else attention_mask & chosen
        else:
            attention_mask = attention_mask.masked_fill(~chosen, -math.inf)
    # As in transformers' own sdpa attention: no mask on a causal module means purely causal, but a single query (a
    # decoding step) sees every key.
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = (
        query.shape[2] > 1 and attention_mask is None and is_causal
    )  # `is_causal` last, so the result is a plain bool
    if cu_seq_lens_q is not None and output_attentions:
        raise ValueError("packed batches have no attention weights to show: use padded batches")
    if cu_seq_lens_q is not None and not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError("packed batches cannot go on from a cache: use padded batches")
    if cu_seq_lens_q is not None and attention_mask is not None:
        # Some decoders get one all the same. It need not keep the sequences apart.
        sequence, _ = _sequence_and_position(cu_seq_lens_q, query.shape[2])
        apart = sequence[:, None] != sequence
        blocked = False if attention_mask.dtype == torch.bool else -math.inf
        attention_mask, cu_seq_lens_q = attention_mask.masked_fill(apart, blocked), None
    groups = query.shape[1] // key.shape[1]
    if cu_seq_lens_q is not None:
        output = softmax_n_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seq_lens_q,
            max_length_q,
            dropout,
            is_causal,
            scaling,
            log_n=log_n,
        )
        return output[None], None
    if output_attentions:
        key, value = _shared_heads(query, key, value, dim=1)
        call = _Call(attention_mask, dropout, is_causal, scaling, _per_head(log_n, query, 1))
        output, weights = _eager_attention(query, key, value, call)
    else:
        output = softmax_n_attention(
            query, key, value, attention_mask, dropout, is_causal, scaling, log_n=log_n, enable_gqa=bool(groups > 1)
        )
        weights = None
    output = output.transpose(1, 2)
    if _is_exporting():  # a copy in the graph: what ONNX makes of the attention has other strides
        return output.clone(memory_format=torch.contiguous_format), weights
    return output.contiguous(), weights


def log_n_of(module: nn.Module) -> float | Tensor:
    """log n of an attention module: of its config's softmax_n, a float (-inf is softmax), or its learned sinks (H,)."""
    n = getattr(module.config, "softmax_n", 0.0)
    return module.log_n if n == LEARNED else _log(n, None)


def learned_sinks(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: log n of its heads (H,)} of the learned sinks that apply_softmax_n or a config put into the model."""
    return {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "log_n"}


# Without its own mask function an attention gets no mask at all, and padding would leak.
AttentionInterface.register(ATTENTION, softmax_n_attention_forward)
AttentionInterface.register(EAGER_ATTENTION, functools.partial(softmax_n_attention_forward, output_attentions=True))
AttentionInterface.register(ADDITIVE_ATTENTION, softmax_n_attention_forward)
for _name, _mask in ((ATTENTION, sdpa_mask), (EAGER_ATTENTION, sdpa_mask), (ADDITIVE_ATTENTION, eager_mask)):
    AttentionMaskInterface.register(_name, _mask)


def _check_version() -> None:
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(f"softmax_n models need transformers 5.0 or later, found {transformers.__version__}")


def apply_softmax_n(model: nn.Module, n: float | str | None = None) -> nn.Module:
    """Make every attention of a transformers model use softmax_n ("surgery", in place). Weights stay as they are.

    First the model is run on a few made-up tokens, with its own softmax attention and with ours at n = 0 (or with its
    own sinks). It is taken if both agree, and every attention seen was ours. To see the attention weights, pass
    output_attentions=True or, where the model does not hand that on, set_attn_implementation("softmax_n_eager").

    Args:
        model: a PreTrainedModel, or a module around one.
        n: finite real number >= 0, 0 being softmax; "learned" for a parameter `log_n` (H,) in each attention module,
            which starts at 0 (n = 1) where there is none yet; None for a model that has learned attention sinks of its
            own, such as gpt-oss.

    Returns:
        The same model.

    Raises:
        ValueError: n is none of these, or the model cannot be taken; it is then left as it was.
    """
    _check_version()
    n = n if n is None or n == LEARNED else checked_softmax_n(n)
    roots: list[PreTrainedModel] = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not any(part in set(root.modules()) for root in roots):
            roots.append(part)
    if not roots:
        raise ValueError(f"apply_softmax_n needs a transformers model, got {type(model).__name__}")
    # On copies of the configs: another model may have been built with the same ones, and a failure changes nothing.
    places = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PretrainedConfig)
    ]
    copies: dict = {}
    try:
        for module, name, config in places:
            copied = copy.deepcopy(config, copies)
            copied.__class__ = vars(type(copied)).get("stock", type(copied))
            setattr(module, name, copied)
        put_in = [_put_in(root, n) for root in roots]
    except BaseException:
        for module, name, config in places:
            setattr(module, name, config)
        raise
    for root, class_changes in zip(roots, put_in, strict=True):
        _add_sinks(root, root.config.softmax_n_heads if n == LEARNED else {})
        if class_changes:
            _change_class(root, n)
        elif isinstance(root, _SoftmaxNModel):
            root._mark()
    return model


def _put_in(model: PreTrainedModel, n: float | str | None) -> bool:
    """Set the configs of the model, which is tested first; with learned sinks, `softmax_n_heads` in them names the
    classes of its attention, with their heads. Returns whether the model's class has to change: not where it sees to
    its attention itself."""
    configs = {id(config): config for module in model.modules() for config in vars(module).values()}
    configs = [config for config in configs.values() if isinstance(config, PretrainedConfig)]
    refused = f"{type(model).__name__} does not take its attention from transformers' attention interface"

    def choose(attention: str, amount: float | str, heads: dict[str, int] | None = None) -> None:
        for config in configs:
            config.softmax_n, config._attn_implementation_internal = amount, attention
            vars(config).pop("softmax_n_heads", None)
            if heads:
                config.softmax_n_heads = heads

    choose("eager", 0.0)
    if model.config._attn_implementation != "eager":
        heads = {"RobertaSelfAttention": model.config.num_attention_heads} if n == LEARNED else None
        if n is None or (heads and not isinstance(model, _SoftmaxNModel)):
            raise ValueError(f"{type(model).__name__} takes a number n, got {n!r}")
        choose(ATTENTION, n, heads)
        return False
    inputs, expected = _first_run(model)
    if inputs is None and not (model._supports_attention_backend and isinstance(n, float)):
        raise ValueError(f"{refused}, or it could not be tried: {expected}")
    attention, error, watch = ATTENTION, None, _Watch()
    for attention in (ATTENTION, ADDITIVE_ATTENTION) if inputs is not None else ():
        choose(attention, OWN if n is None else 0.0)
        try:
            with watch:
                found = _run(model, inputs)
            difference = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
            error = None if difference <= 1 else f"its output is another ({difference:.0f} times the rounding)"
        except ValueError:
            raise
        except Exception as failure:  # of a model that computes with a mask of another kind
            error = f"it stops with {type(failure).__name__}: {failure}"
        if watch.others or not error:
            break
    if inputs is not None and (watch.others or not watch.ours):
        raise ValueError(f"{refused}{watch.where(model)}, so softmax_n cannot be put into it")
    if error:
        raise ValueError(f"softmax_n cannot be put into {type(model).__name__}: with n = 0, {error}")
    if n is None and not watch.sinks:
        raise ValueError(f"{type(model).__name__} has no attention sinks of its own: give n, or {LEARNED!r}")
    heads = {type(module).__name__: count for module, count in watch.ours.items()}
    if n == LEARNED and any(heads[type(module).__name__] != count for module, count in watch.ours.items()):
        raise ValueError(f"{type(model).__name__} has attention of several numbers of heads: {heads}")
    choose(attention, OWN if n is None else n, heads if n == LEARNED else None)
    for part in model.modules():  # such as the tower of images, which was given none
        if isinstance(part, PreTrainedModel) and watch.seen.isdisjoint(part.modules()):
            part._softmax_n_watch = _Watch()
            part.register_forward_pre_hook(_start_watching)
            part.register_forward_hook(_stop_watching, always_call=True)
    return True


def _start_watching(module: nn.Module, args: tuple) -> None:
    """On the first forward of what was not tried when n was chosen."""
    if module._softmax_n_watch is not None:
        module._softmax_n_watch.__enter__()


def _stop_watching(module: nn.Module, args: tuple, output: object) -> None:
    watch, module._softmax_n_watch = module._softmax_n_watch, None
    if watch is not None:
        watch.__exit__(None, None, None)
        if watch.others:
            raise ValueError(f"{type(module).__name__} attends with softmax{watch.where(module)}: it has no softmax_n")


def _first_run(model: PreTrainedModel) -> tuple[dict | None, list[Tensor] | str]:
    """Made-up inputs with which the model runs as it is, and its outputs; or None and why there are none."""
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
    """Two samples of what the model takes in first, or of everything that it can take; the second is padded."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    vision, text = getattr(config, "vision_config", config), config.get_text_config()

    def numbers_like(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=model.device).reshape(shape)

    def floats(*shape: int) -> Tensor:
        return numbers_like(*shape).cos().to(model.dtype)

    inputs = {}
    wanted = [name for name in parameters if everything or name == model.main_input_name]
    if "input_ids" in wanted:
        inputs["input_ids"] = 5 + numbers_like(2, 8) * 7 % (text.vocab_size - 5)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = (numbers_like(2, 8) != 14).long() * (numbers_like(2, 8) != 15)
    if "decoder_input_ids" in parameters and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = 5 + numbers_like(2, 4) * 7 % (config.vocab_size - 5)
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
    """The model's outputs, with the mask and without, in eval mode and without its hooks, which may count."""
    modules = list(model.modules())
    tables = [table for module in modules for table in (module._forward_hooks, module._forward_pre_hooks)]
    modes, hooks = [module.training for module in modules], [dict(table) for table in tables]
    try:
        for module in modules:
            module.training = False
        for table in tables:
            table.clear()
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)  # some draw random numbers even so
            outputs = [model(**inputs, return_dict=True)]
            if "attention_mask" in inputs:
                outputs.append(model(**{**inputs, "attention_mask": None}, return_dict=True))
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for table, before in zip(tables, hooks, strict=True):
            added = dict(table)  # by transformers, which would not add them again
            table.clear()
            table.update(before | added)
    return [x for output in outputs for x in output.values() if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of what rounding may make of it; of a model with damaged weights, where finite."""
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    found, exact = found.double()[finite], expected.double()[finite]
    # Wide, because layer norms amplify rounding: with 3e-5 a RoBERTa of nearly constant rows was refused.
    allowed = (1e-3 if expected.dtype.itemsize > 2 else 0.1) * exact.abs().max().clamp_min(1e-30)
    return ((found - exact).abs().max() / allowed).nan_to_num(math.inf).item()


PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")
OURS = softmax_n_attention_forward.__name__  # a name, since a second copy of this file may have registered its own
ATTENTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")


class _Watch(TorchFunctionMode):
    """Sees what attends while a model runs.

    ours: modules whose attention is softmax_n_attention_forward, with their heads; sinks: whether one of them has some;
    others: modules with another attention: a softmax of a product of matrices whose weights multiply a third one;
    seen: modules that computed anything.
    """

    def __init__(self):
        super().__init__()
        self.ours, self.others, self.seen, self.sinks = {}, set(), set(), False
        self.products, self.weights = {}, {}  # tensors by id, held so that no other gets it

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and frame.f_code.co_name != OURS:
            if isinstance(frame.f_locals.get("self"), nn.Module):
                break
            frame = frame.f_back
        if frame is None:
            return result
        if frame.f_code.co_name == OURS:
            self.ours[frame.f_locals["module"]] = frame.f_locals["query"].shape[1]
            self.sinks = self.sinks or frame.f_locals["s_aux"] is not None
            return result
        module, name = frame.f_locals["self"], getattr(function, "__name__", "")
        self.seen.add(module)
        given = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(x, Tensor)]
        if name in ATTENTIONS or (name in PRODUCTS and any(id(x) in self.weights for x in given)):
            self.others.add(module)
        elif name in PRODUCTS:
            self.products[id(result)] = result
        elif isinstance(result, Tensor) and name != "linear":
            for kind in (self.products, self.weights):
                if any(
                    id(x) in kind and (x.numel() == result.numel() or name in ("cat", "__getitem__")) for x in given
                ):
                    kind = self.weights if name == "softmax" else kind
                    kind[id(result)] = result
        return result

    def where(self, model: nn.Module) -> str:
        """ " in" and the names of `others`."""
        names = [name or type(model).__name__ for name, module in model.named_modules() if module in self.others]
        return f" in {', '.join(names)}" if names else ""


# ------------------------------------------------------------------------------------------------- RoBERTa with it


# Stands behind the activation's name in config.json, so that no stock class finds the activation: building the model
# raises, with this sentence, whichever attention the caller asks for.
STOP_STOCK = (
    ", in a softmax_n model: load it with AutoModelForMaskedLM.from_pretrained or another Auto class and "
    "trust_remote_code=True; stock code would attend with softmax"
)


class _SoftmaxNConfig:
    """What the configs of softmax_n models share: `softmax_n`, which is n or "learned", and how they are saved.

    Three things in config.json keep stock classes from loading the weights and quietly attending with softmax: the
    model_type, which makes them warn; the name of the attention, which they do not find; and `STOP_STOCK`.

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
        """softmax_n, whatever was asked for: every module, and every class around it, reads its attention here.

        A registered attention whose name begins with "softmax_n" promises to read n from the config; every other name
        is answered with "softmax_n".
        """
        asked_for = getattr(self, "_attn_implementation_internal", None)
        return asked_for if str(asked_for).startswith(ATTENTION) else ATTENTION

    def to_dict(self) -> dict:
        """As transformers has it, and what it leaves out: the attention, and the classes of this file beside the one
        that is being saved."""
        attention = ADDITIVE_ATTENTION if self._attn_implementation == ADDITIVE_ATTENTION else ATTENTION
        return {**super().to_dict(), "_attn_implementation": attention, "auto_map": dict(self.softmax_n_auto_map)}

    def to_diff_dict(self) -> dict:
        """What config.json holds."""
        if isinstance(getattr(self, "hidden_act", None), str):
            return {**super().to_diff_dict(), "hidden_act": f"{self.hidden_act}{STOP_STOCK}"}
        return {**super().to_diff_dict(), "quantization_config": {"softmax_n": STOP_STOCK}}  # has no method: it raises


class _SoftmaxNModel:
    """What softmax_n models share: attention with n = `config.softmax_n`; construction fails otherwise."""

    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.softmax_n == LEARNED:
            _add_sinks(self, config.softmax_n_heads)
        self._mark()
        check_attention(self)

    def _mark(self) -> None:
        """Add the empty buffer `softmax_n`, unless n = 0: a softmax model does not load a state_dict that has it."""
        self._buffers.pop("softmax_n", None)
        if self.config.softmax_n != 0:
            self.register_buffer("softmax_n", torch.empty(0, device=self.device))
        for about in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            setattr(self, about, {r"(^|\.)softmax_n$", *(getattr(self, about) or ())})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if "softmax_n" in self._buffers:  # a state_dict of the stock class is taken too
            state_dict.setdefault(f"{prefix}softmax_n", self.softmax_n)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def initialize_weights(self) -> None:
        """Sinks that were not in the folder start at n = 1 too."""
        super().initialize_weights()
        for name, parameter in self.named_parameters():
            if name.endswith(".log_n") and not getattr(parameter, "_is_hf_initialized", False):
                nn.init.zeros_(parameter)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Takes registered names that begin with "softmax_n", such as "softmax_n_eager": they promise to read n from
        the config. ValueError for any other, which would make it a softmax model."""
        if not str(attn_implementation).startswith(ATTENTION):
            raise ValueError(
                f"this model attends with softmax_n (n = {self.config.softmax_n}); "
                f"{attn_implementation!r} would silently make it a softmax model"
            )
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


def _add_sinks(model: nn.Module, heads: dict[str, int]) -> None:
    """A parameter `log_n` (H,) of zeros in each module of the classes in `heads` that has none; others lose theirs."""
    for module in model.modules():
        if type(module).__name__ not in heads:
            module._parameters.pop("log_n", None)
        elif "log_n" not in module._parameters:
            like = next(module.parameters())
            module.log_n = nn.Parameter(like.new_zeros(heads[type(module).__name__]))


def _change_class(model: PreTrainedModel, n: float | str | None) -> None:
    """Make the model one of a class that is saved with its n, or, for softmax and a model's own sinks, a stock one."""
    model._buffers.pop("softmax_n", None)
    model.__class__ = vars(type(model)).get("stock", type(model))
    if n is not None and n != 0:
        model.__class__ = softmax_n_class(type(model))
        model.config.__class__ = model.config_class
        model._mark()


@functools.cache
def softmax_n_class(stock: type) -> type:
    """The class of transformers models or configs that is `stock` with softmax_n: SoftmaxNLlamaForCausalLM.

    It is an attribute of this module too, where from_pretrained with trust_remote_code=True finds it.
    """
    about = {"__module__": __name__, "__doc__": f"{stock.__name__} with softmax_n.", "stock": stock}
    if issubclass(stock, PretrainedConfig):
        autos = {"AutoConfig": f"softmax1.SoftmaxN{stock.__name__}"}
        for name in dir(transformers):
            mapping = getattr(getattr(transformers, name), "_model_mapping", ()) if name.startswith("AutoModel") else ()
            model = mapping[stock] if stock in mapping else None
            if isinstance(model, type):
                autos[name] = f"softmax1.SoftmaxN{model.__name__}"
        about |= {
            "softmax_n_auto_map": autos,
            "model_type": f"softmax-n-{stock.model_type}",
            "_auto_class": "AutoConfig",
        }
        about["__init__"] = lambda self, *args, **kwargs: _SoftmaxNConfig.__init__(self, *args, **kwargs)
        return type(f"SoftmaxN{stock.__name__}", (_SoftmaxNConfig, stock), about)
    about["config_class"] = softmax_n_class(stock.config_class)
    autos = about["config_class"].softmax_n_auto_map
    full = f"softmax1.SoftmaxN{stock.__name__}"
    about["_auto_class"] = next((auto for auto, name in autos.items() if name == full), "AutoModel")
    return type(f"SoftmaxN{stock.__name__}", (_SoftmaxNModel, stock), about)


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix("SoftmaxN"), None) if name.startswith("SoftmaxN") else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return softmax_n_class(stock)


class RobertaSoftmaxNConfig(_SoftmaxNConfig, RobertaConfig):
    """RobertaConfig with `softmax_n`, the n of its attention (a finite real number >= 0; 1 is softmax1; or "learned").

    Raises:
        ValueError: softmax_n is negative, NaN or infinite.
    """

    model_type = "roberta-softmax-n"

    def __init__(self, softmax_n: float | str = 1.0, **kwargs):
        super().__init__(softmax_n, **kwargs)
        if self.softmax_n == LEARNED:
            self.softmax_n_heads = {"RobertaSelfAttention": self.num_attention_heads}

    @property
    def softmax_n_auto_map(self) -> dict[str, str]:
        return AUTO_MAP


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless the model's self-attention, run on three tokens, gives softmax_n of the definition.

    It runs the first layer's own module, as the installed transformers has built it, on identity projections in float64
    on the CPU; so it needs no weights and draws no random numbers, in hundredths of a second. The last key is masked.
    """
    attention = next((module for module in model.modules() if isinstance(module, RobertaSelfAttention)), None)
    if not attention:
        return
    size, heads, n = model.config.hidden_size, model.config.num_attention_heads, model.config.softmax_n
    n = 1.0 if n == LEARNED else n
    on_cpu = {"dtype": torch.float64, "device": "cpu"}
    # Scores of about 1, beside which n counts.
    hidden = torch.arange(3 * size, **on_cpu).cos().mul((size // heads) ** -0.25).reshape(1, 3, size)
    mask = torch.tensor([[[[0.0, 0.0, -math.inf]]]], **on_cpu)
    identity = {
        name: torch.eye(size, **on_cpu) if parameter.dim() == 2 else torch.tensor(0.0, **on_cpu).expand(len(parameter))
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


class _SoftmaxNRoberta(_SoftmaxNModel):
    """Same modules, parameter names and initial weights (for a seed) as the stock class."""

    config_class = RobertaSoftmaxNConfig


class RobertaSoftmaxNModel(_SoftmaxNRoberta, transformers.RobertaModel):
    """RobertaModel with softmax_n attention; so the others."""


class RobertaSoftmaxNForMaskedLM(_SoftmaxNRoberta, transformers.RobertaForMaskedLM): ...


class RobertaSoftmaxNForCausalLM(_SoftmaxNRoberta, transformers.RobertaForCausalLM): ...


class RobertaSoftmaxNForSequenceClassification(_SoftmaxNRoberta, transformers.RobertaForSequenceClassification): ...


class RobertaSoftmaxNForTokenClassification(_SoftmaxNRoberta, transformers.RobertaForTokenClassification): ...


class RobertaSoftmaxNForQuestionAnswering(_SoftmaxNRoberta, transformers.RobertaForQuestionAnswering): ...


class RobertaSoftmaxNForMultipleChoice(_SoftmaxNRoberta, transformers.RobertaForMultipleChoice): ...


MODELS = {
    getattr(transformers, f"AutoModel{model.__name__.removeprefix('RobertaSoftmaxN').removeprefix('Model')}"): model
    for model in _SoftmaxNRoberta.__subclasses__()
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
    transformers.AutoConfig.register(RobertaSoftmaxNConfig.model_type, RobertaSoftmaxNConfig, exist_ok=True)
    for _auto, _model in MODELS.items():
        _auto.register(RobertaSoftmaxNConfig, _model, exist_ok=True)
