"""Every path of softmax_n attention against the definition in float64: values, gradients, what it composes with.

The paths on a GPU are the same tests over other parameters: `pytest -m cuda tests/test_attention.py` runs them alone.
"""

import importlib.util
import logging
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

import softmax1
from softmax1 import (
    RobertaSoftmaxNConfig,
    RobertaSoftmaxNForMaskedLM,
    apply_softmax_n,
    attention_backend,
    softmax_n,
    softmax_n_attention,
    softmax_n_attention_varlen,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NS = [0.5, 1.0, "sinks"]
# A log n a head, as models store it. Small and large beside scores of about 1, and none that bfloat16 can represent.
SINKS = torch.tensor([-1.3, 0.9, 2.7, 4.3], dtype=F64)
GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
FOR_CUDNN = [*GPU, pytest.mark.skipif(not HOPPER, reason="needs a Hopper or a Blackwell GPU of a data center")]


def paths(cpu, cuda):
    """(backend, device, dtype) for {backend: dtypes}, on the CPU and on a GPU."""
    names = {F64: "float64", F32: "float32", BF16: "bfloat16", F16: "float16"}
    return [
        pytest.param(
            (backend, device, dtype),
            id=f"{backend}-{device}-{names[dtype]}",
            marks=FOR_CUDNN if backend == "cudnn" else marks,
        )
        for device, backends, marks in (("cpu", cpu, []), ("cuda", cuda, GPU))
        for backend, dtypes in backends.items()
        for dtype in dtypes
    ]


EVERY = [F64, F32, BF16, F16]
ON_GPU = {"flash": [BF16, F16], "efficient": [F32, BF16, F16], "zero_key": [F64, BF16], "eager": [F32, BF16]}

PATHS = paths({"cpu": EVERY, "zero_key": EVERY, "eager": EVERY}, ON_GPU)
DROPOUT_PATHS = paths({"zero_key": [F64, F32, BF16], "eager": [F64, F32, BF16]}, ON_GPU)
SOME_PATHS = paths({"cpu": [F32], "zero_key": [F32], "eager": [F32]}, {"flash": [BF16], "efficient": [F32, BF16]})
ONLY_DENSE = paths({}, {"cudnn": [BF16, F16]})


def by_definition(scores, value, n, drop):
    exponentials = scores.exp()
    return exponentials / (n + exponentials.sum(-1, keepdim=True)) * drop @ value


def by_plain_formula(scores, value, n, drop):
    return softmax1.softmax_n(scores, n) * drop @ value


class ByKernels(torch.autograd.Function):
    """The plain formula with the gradient that fast kernels take, from delta = dy . y."""

    @staticmethod
    def forward(ctx, scores, value, n, drop):
        weights = softmax1.softmax_n(scores, n)
        output = weights * drop @ value
        ctx.save_for_backward(weights, value, output, n if isinstance(n, torch.Tensor) else None)
        ctx.drop = drop
        return output

    @staticmethod
    def backward(ctx, grad):
        weights, value, output, n = ctx.saved_tensors
        grad_weights = grad @ value.transpose(-2, -1) * ctx.drop
        delta = (grad * output).sum(-1, keepdim=True)
        grad_n = None if n is None else -((1 - weights.sum(-1, keepdim=True)) * delta).sum((0, 2))[:, None] / n
        return weights * (grad_weights - delta), (weights * ctx.drop).transpose(-2, -1) @ grad, grad_n, None


def definition(query, key, value, n, mask=None, is_causal=False, drop=1.0, attend=by_definition):
    """softmax_n attention as it is written, for moderate scores. `mask` is boolean or added; n a float or (H, 1, 1)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return attend(scores, value, n, drop if isinstance(drop, float) else drop.to(scores.dtype))


def given(n, sinks):
    """How attention is told n: as a number, or as a leaf `sinks` that is log n."""
    return {"n": n} if n != "sinks" else {"log_n": sinks}


def amount(n, sinks):
    """n as `definition` takes it."""
    return n if n != "sinks" else sinks.exp()[:, None, None]


def with_sinks(inputs, n, heads=4):
    return [*inputs, SINKS[:heads]] if n == "sinks" else [*inputs]


def outputs_and_gradients(function, inputs, upstream, dtype):
    # Sinks are kept in float32 beside half precision.
    dtypes = [torch.promote_types(dtype, F32) if x.dim() == 1 else dtype for x in inputs]
    leaves = [x.detach().to(to).requires_grad_() for x, to in zip(inputs, dtypes, strict=True)]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype), materialize_grads=True)
    assert [x.dtype for x in gradients] == dtypes
    return [output, *gradients]


def assert_within_2x(path, inputs, upstream, ours, formula, stock):
    """Error of `ours` at most 2x (gradients 3x, of sinks 6x) that of the plain formula in the same dtype.

    `formula(attend)` is the definition as a function of (query, key, value) and of sinks, where there are any. What
    rests on a kernel may take delta as
    kernels do: dy . y, from the rounded y, cancels where one key has nearly all the mass. And the float32 kernel of a
    GPU, with its three TF32 products for one and its fast exponentials, may err as `stock` does, a pair of stock
    attention by that kernel and of what it should give.
    """
    backend, device, dtype = path
    inputs = [x.to(device, torch.promote_types(dtype, F32) if x.dim() == 1 else dtype) for x in inputs]  # rounded
    upstream = upstream.to(device, dtype)
    with attention_backend(backend):
        results = outputs_and_gradients(ours, inputs, upstream, dtype)
    expected = outputs_and_gradients(formula(by_definition), inputs, upstream, F64)
    if dtype == F64:  # the reference itself is no better
        assert_close(results, expected, rtol=1e-12, atol=1e-13)
        return
    yardsticks = [(formula(by_plain_formula), expected)]
    if backend != "eager":
        yardsticks.append((formula(ByKernels.apply), expected))
    if (backend, dtype) == ("efficient", F32):
        yardsticks.append((stock[0], outputs_and_gradients(stock[1], inputs, upstream, F64)))
    errors = [largest_errors(outputs_and_gradients(f, inputs, upstream, dtype), exact) for f, exact in yardsticks]
    allowed = [max(x) for x in zip(*errors, strict=True)]
    for limit, exact in zip(allowed, expected, strict=True):  # what errs more is no yardstick
        assert limit <= torch.finfo(dtype).eps ** 0.5 * exact.abs().max()
    errors = largest_errors(results, expected)
    # The gradient of the sinks is a number a head, whose largest error varies more than that of many numbers.
    factors = (2, 3, 3, 3, 6)[: len(results)]
    for factor, result, exact, error, limit in zip(factors, results, expected, errors, allowed, strict=True):
        assert result.shape == exact.shape
        assert error <= factor * limit + torch.finfo(dtype).eps * exact.abs().max().item()
    assert results[0].dtype == dtype


def largest_errors(results, expected):
    return [(a.double() - b).abs().max().item() for a, b in zip(results, expected, strict=True)]


# ------------------------------------------------------------------------------------------------------ dense attention


def dense_case(name):
    """(query, key, value) in float64, the arguments of the attention, for one kind of input."""
    torch.manual_seed(0)
    samples, heads, groups, length, keys, size, sizes = 24, 4, 4, 12, 12, 16, 16  # many: both maxima are typical ones
    options = {}
    if name == "one token":
        length = keys = 1
    elif name == "short rows":
        length = keys = 3
    elif name == "more keys":
        keys = 19
    elif name == "odd sizes":
        size, sizes, length, keys = 20, 12, 13, 13
    elif name == "long":
        samples, length, keys, size, sizes = 2, 150, 150, 64, 64
    elif name.startswith("causal"):
        options["is_causal"] = True
        length, keys = {"causal": (12, 12), "causal, more keys": (9, 14), "causal, more queries": (14, 9)}[name]
    if name in ("shared heads", "causal"):
        groups = 2
    shapes = (samples, heads, length, size), (samples, groups, keys, size), (samples, groups, keys, sizes)
    query, key, value = (torch.randn(shape, dtype=F64) for shape in shapes)
    if name == "short rows":  # low scores, so that a missing null key would show
        query[..., 0], key[..., 0] = -8.0, 4.0
    if name == "padding mask":
        options["attn_mask"] = torch.rand(samples, 1, 1, keys) > 0.3
        options["attn_mask"][0] = False  # fully masked
    elif name == "boolean mask":
        options["attn_mask"] = torch.rand(samples, heads, length, keys) > 0.3
        options["attn_mask"][1, :, 5] = False
    elif name == "mask over keys":  # broadcasts over the keys
        options["attn_mask"] = torch.rand(samples, 1, length, 1) > 0.3
    elif name == "additive mask":
        options["attn_mask"] = torch.randn(1, heads, length, keys)
        options["attn_mask"][..., 7:] = -math.inf
        options["attn_mask"][:, 0, 3] = -math.inf
    return (query, key, value), options


MASKS = ["padding mask", "boolean mask", "mask over keys", "additive mask"]
CASES = ["plain", "one token", "short rows", "more keys", "odd sizes", "long", "shared heads", "causal", *MASKS]
CASES += ["causal, more keys", "causal, more queries"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("path", PATHS + ONLY_DENSE)
def test_dense(path, n, case):
    backend, device, dtype = path
    inputs, options = dense_case(case)
    upstream = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=F64)
    mask = options.pop("attn_mask", None)
    mask = None if mask is None else mask.to(device) if mask.dtype == torch.bool else mask.to(device, dtype)

    def ours(query, key, value, sinks=None):
        shared = query.shape[1] != key.shape[1]
        return softmax_n_attention(query, key, value, mask, enable_gqa=shared, **given(n, sinks), **options)

    unmasked_only = backend in ("cudnn", "flash") and (mask is not None or case.startswith("causal, "))
    if unmasked_only or (backend == "cudnn" and case == "one token"):
        with attention_backend(backend), pytest.raises(ValueError, match=f"'{backend}' cannot do this"):
            ours(*(x.to(device, dtype) for x in inputs), SINKS.to(device))
        return

    def formula(attend):
        return lambda query, key, value, sinks=None: definition(
            query, key, value, amount(n, sinks), mask, attend=attend, **options
        )

    def stock(query, key, value, sinks=None):  # the same function: one more key and value of zeros
        log_n = softmax1._log(n, None) if sinks is None else sinks
        call = softmax1._Call(mask, 0.0, options.get("is_causal", False), None, log_n, False)
        # With a key for every head: for shared ones PyTorch leaves the kernel for plain operations.
        return softmax1._zero_key_attention(query, *softmax1._shared_heads(query, key, value, dim=-3), call)

    assert_within_2x(path, with_sinks(inputs, n), upstream, ours, formula, (stock, formula(by_definition)))


@pytest.mark.parametrize("kind", ["number", "sink"])
@pytest.mark.parametrize("log_n", [3.0151, -3.0001, 5.03])
def test_bfloat16_does_not_round_n_through_public_attention(log_n, kind):
    """One key as good as the null key, so the output is 1/2. log n rounded to bfloat16 would be another by up to 2^-6
    of it, and the output by 0.4 to 0.8 %: a second null key makes up for that."""
    exact = torch.tensor(log_n, dtype=F64).to(BF16).double()  # the key's score, which bfloat16 holds
    query, key, value = (torch.full((1, 1, 1, 8), x, dtype=BF16) for x in (0.125, exact, 1.0))
    given = {"number": log_n, "sink": torch.tensor([log_n])}[kind]
    with attention_backend("zero_key"):
        found = softmax_n_attention(query, key, value, scale=1.0, log_n=given).double()
    expected = torch.sigmoid(exact - log_n)
    assert ((found - expected).abs() / expected).max() <= 2**-8  # the weight and the output are rounded once each


@pytest.mark.parametrize("path", PATHS)
def test_fully_masked_rows_are_zero_with_gradient_zero(path):
    backend, device, dtype = path
    if backend == "flash":
        pytest.skip("takes no mask")
    inputs = [x[:2].to(device, dtype).requires_grad_() for x in dense_case("plain")[0]]
    masked = torch.zeros(2, 1, 12, 12, dtype=torch.bool, device=device)
    lowest = torch.full(masked.shape, torch.finfo(dtype).min, dtype=dtype, device=device)  # as some models mask
    sinks = SINKS.to(device).requires_grad_()
    for mask in (masked, lowest, torch.full_like(lowest, -math.inf)):
        for n in ({"n": 0.5}, {"log_n": sinks}):
            with attention_backend(backend):
                output = softmax_n_attention(*inputs, mask, **n)
                gradients = torch.autograd.grad(
                    output, [*inputs, *([sinks] if "log_n" in n else [])], torch.ones_like(output)
                )
            assert not any(x.any() for x in (output, *gradients))


def test_a_masked_score_that_overflows_does_no_harm():
    query = torch.full((1, 1, 2, 64), 900.0, dtype=F16)
    key = query.clone()
    key[..., 0, :] = 0
    mask = torch.tensor([[True, False]] * 2)
    with attention_backend("eager"):
        assert_close(softmax_n_attention(query, key, query, mask), query / 2)  # one score of 0, and n = 1


def test_extreme_scores():
    # exp(lse) overflows, or vanishes beside n; neither may give NaN or lose the limit.
    query, key = torch.full((1, 1, 1, 1), 1e2), torch.full((1, 1, 1, 1), 1e2)
    for sign, limit in ((1, 1.0), (-1, 0.0)):
        inputs = [x.requires_grad_() for x in (query * 1, key * sign, torch.ones(1, 1, 1, 1))]
        output = softmax_n_attention(*inputs, n=3.0)
        assert output.item() == limit
        assert [x.item() for x in torch.autograd.grad(output, inputs)] == [0.0, 0.0, limit]


@pytest.mark.parametrize("path", SOME_PATHS + ONLY_DENSE)
def test_arguments_of_any_layout_are_left_alone(path):
    backend, device, dtype = path
    torch.manual_seed(0)
    fused = torch.randn(2, 12, 3, 4, 16).to(device, dtype)
    layouts = [
        [x.transpose(1, 2) for x in fused.unbind(2)],  # one projection for all three
        [x.transpose(1, 2).mT.contiguous().mT for x in fused.unbind(2)],  # the head size is not the last in memory
        [torch.randn(2, 4, 12, 17).to(device, dtype)[..., 1:] for _ in range(3)],  # nothing is aligned
    ]
    for inputs in layouts:
        before = [x.clone() for x in inputs]
        leaves = [x.detach().requires_grad_() for x in inputs]
        copies = [x.detach().contiguous().clone().requires_grad_() for x in inputs]
        upstream = torch.randn(2, 4, 12, 16).to(device, dtype)
        expanded = torch.ones((), dtype=dtype, device=device).expand(2, 4, 12, 16)  # as .sum() sends it back
        with attention_backend(backend):
            for gradient in (upstream, upstream.mT.contiguous().mT, expanded):
                ours, theirs = (softmax_n_attention(*x, n=0.5) for x in (leaves, copies))
                dense = gradient.contiguous()
                results = [ours, *torch.autograd.grad(ours, leaves, gradient)]
                assert_close(results, [theirs, *torch.autograd.grad(theirs, copies, dense)])
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# ----------------------------------------------------------------------------------------------------- packed attention

LENGTHS = [12, 1, 25, 2, 40, 7, 0, 3, 0, 0]  # empty ones too, and trailing ones, as batches of a fixed shape have


def packed(device="cpu", dtype=F64, heads=4, groups=4, size=16, lengths=LENGTHS):
    torch.manual_seed(0)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    inputs = [torch.randn(sum(lengths), count, size, dtype=F64).to(device, dtype) for count in (heads, groups, groups)]
    return inputs, cu_seqlens


def each_alone(attention, inputs, lengths=LENGTHS):
    """`attention` of (1, H, L, E) for one sequence after the other."""
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in inputs), strict=True)
    return torch.cat([attention(*part) for part in parts if part[0].numel()], 2)[0].transpose(0, 1)


@pytest.mark.parametrize("case", ["plain", "causal", "shared heads", "odd sizes", "scale"])
@pytest.mark.parametrize("n", [0.0, *NS])
@pytest.mark.parametrize("path", PATHS)
def test_packed(path, n, case):
    inputs, cu_seqlens = packed(
        path[1], groups=2 if case in ("shared heads", "causal") else 4, size=20 if case == "odd sizes" else 16
    )
    is_causal = case == "causal"
    scale = 0.4 if case == "scale" else None
    factor = 1.0 if scale is None else scale * 16**0.5  # of the query, which comes to the same

    def ours(query, key, value, sinks=None):
        # More than the longest sequence and, on the kernels, more than all tokens.
        options = (cu_seqlens, 512, 0.0, is_causal, scale)
        return softmax_n_attention_varlen(query, key, value, *options, **given(n, sinks))

    def formula(attend):
        def attention(query, key, value, sinks=None):
            options = {"n": amount(n, sinks), "is_causal": is_causal, "attend": attend}
            return each_alone(lambda q, k, v: definition(q * factor, k, v, **options), (query, key, value))

        return attention

    def stock(query, key, value, sinks=None):
        log_n = softmax1._log(n, None) if sinks is None else sinks
        call = softmax1._Call(None, 0.0, is_causal, scale, log_n, False)
        key, value = softmax1._shared_heads(query, key, value, dim=-2)
        return each_alone(lambda *x: softmax1._zero_key_attention(*x, call), (query, key, value))

    upstream = torch.randn_like(inputs[0])
    assert_within_2x(path, with_sinks(inputs, n), upstream, ours, formula, (stock, formula(by_definition)))


@pytest.mark.parametrize(
    ("backend", "n", "is_causal"),
    [("auto", 0.5, False), ("auto", 0.5, True), ("zero_key", 0.5, True), ("eager", 0.0, False)],
)
def test_packed_in_rows(backend, n, is_causal):
    # What a device without such a kernel does, and torch.compile on the CPU: all padded to max_seqlen and back.
    inputs, cu_seqlens = packed(groups=2)
    inputs = [x.requires_grad_() for x in inputs]

    def attention(*inputs):
        return softmax_n_attention_varlen(*inputs, cu_seqlens, 40, is_causal=is_causal, n=n)

    torch.compiler.reset()
    with attention_backend(backend):
        in_rows = torch.compile(attention, backend="aot_eager", fullgraph=True)(*inputs)
        in_turn = attention(*inputs)
    upstream = torch.randn_like(in_turn)
    assert_close(in_rows, in_turn)
    assert_close(torch.autograd.grad(in_rows, inputs, upstream), torch.autograd.grad(in_turn, inputs, upstream))


def test_packed_refuses_what_does_not_fit():
    (query, key, value), cu_seqlens = packed()
    with pytest.raises(ValueError, match="one row of int32"):
        softmax_n_attention_varlen(query, key, value, cu_seqlens.long(), 40)
    with pytest.raises(ValueError, match=r"takes \(tokens, heads, size\)"):
        softmax_n_attention_varlen(query[None], key, value, cu_seqlens, 40)
    with pytest.raises(ValueError, match=r"takes \(tokens, heads, size\)"):
        softmax_n_attention_varlen(query, key[1:], value[1:], cu_seqlens, 40)
    nothing = softmax_n_attention_varlen(query[:0], key[:0], value[:0], cu_seqlens[-1:] * 0, 40)
    assert nothing.shape == (0, 4, 16)


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("path", DROPOUT_PATHS + ONLY_DENSE)
def test_dropout_with_the_same_mask(path, n, layout):
    """An identity as value shows the dropout mask of a seed; with it the definition is exact, gradients included."""
    backend, device, dtype = path
    dropout_p, lengths = 0.2, [30, 1, 47, 12, 0]  # at most 64, the head size
    if layout == "dense":
        lengths = [40] * 6
    inputs, cu_seqlens = packed(device, heads=3, groups=3, size=64, lengths=lengths)
    rows = [(start, length) for start, length in zip(cu_seqlens.tolist(), lengths, strict=False) if length]

    def ours(query, key, value, sinks=None):
        torch.manual_seed(7)
        if layout == "packed":
            return softmax_n_attention_varlen(query, key, value, cu_seqlens, 47, dropout_p, **given(n, sinks))
        query, key, value = (x.unflatten(0, (6, 40)).transpose(1, 2) for x in (query, key, value))
        output = softmax_n_attention(query, key, value, dropout_p=dropout_p, **given(n, sinks))
        return output.transpose(1, 2).flatten(0, 1)

    identity = torch.cat([torch.eye(64, device=device)[:length] for _, length in rows])[:, None].expand(-1, 3, -1)
    # With gradients, as below: PyTorch chooses its kernel by that, and each has masks of its own.
    given_inputs = [*(x.to(dtype) for x in inputs[:2]), identity.to(dtype).contiguous(), SINKS[:3].to(device)]
    if backend in ("cudnn", "efficient") and layout == "packed":
        with attention_backend(backend), pytest.raises(ValueError, match=r"another dropout mask|dense attention only"):
            ours(*given_inputs)
        return
    with attention_backend(backend):
        weights = ours(*(x.requires_grad_() for x in given_inputs))
    keeps = [weights[start : start + length, :, :length].transpose(0, 1)[None] != 0 for start, length in rows]
    kept = torch.cat([keep.flatten() for keep in keeps]).double()
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5

    def formula(attend, n=n):
        def attention(query, key, value, sinks=None):
            drops = iter(keep / (1 - dropout_p) for keep in keeps)
            one = lambda q, k, v: definition(q, k, v, amount(n, sinks), drop=next(drops), attend=attend)  # noqa: E731
            return each_alone(one, (query, key, value), lengths)

        return attention

    def stock(query, key, value, sinks=None):
        torch.manual_seed(7)
        call = softmax1._Call(None, dropout_p, False, None, -math.inf)
        if layout == "packed":
            call = call._replace(cu_seqlens=cu_seqlens, max_seqlen=47)
            return softmax1._stock_attention(backend, query, key, value, call)
        query, key, value = (x.unflatten(0, (6, 40)).transpose(1, 2) for x in (query, key, value))
        return softmax1._stock_attention(backend, query, key, value, call).transpose(1, 2).flatten(0, 1)

    upstream = torch.randn_like(inputs[0])
    assert_within_2x(path, with_sinks(inputs, n, 3), upstream, ours, formula, (stock, formula(by_definition, n=0.0)))


@pytest.mark.parametrize("path", paths({"auto": [F32]}, {"cudnn": [BF16], "flash": [BF16], "efficient": [F32]}))
def test_dropout_in_distribution(path):
    """Mean of outputs and of gradients over many masks: those without dropout (both are linear in the mask)."""
    backend, device, dtype = path
    inputs = [x[:2, :2, :5].to(device, dtype).requires_grad_() for x in dense_case("plain")[0]]
    upstream = torch.randn(2, 2, 5, 16).to(device, dtype)

    def run(dropout_p):
        with attention_backend(backend):
            output = softmax_n_attention(*inputs, dropout_p=dropout_p, n=0.5)
        return [x.double() for x in (output, *torch.autograd.grad(output, inputs, upstream))]

    torch.manual_seed(0)
    runs = [torch.stack(x) for x in zip(*(run(0.3) for _ in range(1500)), strict=True)]
    for sample, expected in zip(runs, run(0.0), strict=True):
        assert sample.std(0).min() > 0
        # 640 entries in all: 5 sigma has odds of about 1 in 3,000; half precision rounds each by half an eps.
        # Of a row's largest entry, since what is summed in half precision is rounded on the way.
        slack = 0 if dtype == F32 else torch.finfo(dtype).eps * expected.abs().amax(-1, keepdim=True)
        assert ((sample.mean(0) - expected).abs() < 5 * sample.std(0) / len(sample) ** 0.5 + slack).all()


# ---------------------------------------------------------------------------------------------- what it composes with


def leaves(path, count=4):
    _, device, dtype = path
    return [x[:count].to(device, dtype).requires_grad_() for x in dense_case("plain")[0]]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("path", paths({"cpu": [F32]}, {"cudnn": [BF16], "flash": [BF16], "efficient": [F32]}))
def test_torch_compile(path, dynamic):
    inputs = leaves(path)
    mask = torch.ones(4, 1, 1, 12, dtype=torch.bool, device=path[1])
    mask[0, ..., 9:] = False

    def attention(query, key, value):
        masked = None if path[0] in ("cudnn", "flash") else mask
        return softmax_n_attention(query, key, value, masked, n=0.5) + softmax_n_attention(
            query, key, value, is_causal=True, scale=0.3, n=1
        )

    torch.compiler.reset()
    with attention_backend(path[0]):
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*inputs)
        eager = attention(*inputs)
    upstream = torch.randn_like(eager)
    assert_close(compiled, eager)
    assert_close(torch.autograd.grad(compiled, inputs, upstream), torch.autograd.grad(eager, inputs, upstream))


def test_torch_compile_makes_no_guard_on_the_length_on_a_cpu():
    query = torch.randn(1, 2, 16, 8)
    torch._dynamo.mark_dynamic(query, 2, min=2, max=4096)  # which raises where the length is guarded
    torch.compiler.reset()
    attention = torch.compile(lambda x: softmax_n_attention(x, x, x), backend="aot_eager", fullgraph=True)
    assert_close(attention(query), softmax_n_attention(query, query, query))


@pytest.mark.parametrize("path", paths({"cpu": [F32]}, {"cudnn": [BF16], "flash": [BF16], "efficient": [F32]}))
def test_torch_compile_where_nothing_needs_a_gradient(path):
    query, key, value = (x.detach() for x in leaves(path))

    def attention(query, key, value):
        return softmax_n_attention(query, key, value, n=0.5)

    torch.compiler.reset()
    with attention_backend(path[0]):
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        assert_close(compiled(query, key, value), attention(query, key, value))
        # And where one does, which is another graph.
        key.requires_grad_()
        upstream = torch.randn_like(query)
        found = torch.autograd.grad(compiled(query, key, value), key, upstream)
        assert_close(found, torch.autograd.grad(attention(query, key, value), key, upstream))


@pytest.mark.slow
@pytest.mark.parametrize("path", SOME_PATHS + ONLY_DENSE)
def test_torch_compile_with_inductor(path):
    inputs = leaves(path)
    torch.compiler.reset()
    with attention_backend(path[0]):
        compiled = torch.compile(lambda *x: softmax_n_attention(*x, n=0.5), fullgraph=True)(*inputs)
        eager = softmax_n_attention(*inputs, n=0.5)
    upstream = torch.randn_like(eager)
    assert_close(compiled, eager)
    assert_close(torch.autograd.grad(compiled, inputs, upstream), torch.autograd.grad(eager, inputs, upstream))


@pytest.mark.parametrize("n", [0.0, 0.5])
@pytest.mark.parametrize("path", paths({"auto": [F32]}, {"auto": [F32]}))
def test_autocast_casts_as_stock_attention_does(path, n):
    device = path[1]
    (query, key, value), cu_seqlens = packed(device, F32)
    key = key.to(BF16)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with torch.autocast(device, BF16):
        output = softmax_n_attention_varlen(*inputs, cu_seqlens, 40, n=n)
        dense = softmax_n_attention(*(x.transpose(0, 1)[None] for x in inputs), n=n)
    assert output.dtype == dense.dtype == BF16
    assert torch.equal(output, softmax_n_attention_varlen(*(x.to(BF16) for x in inputs), cu_seqlens, 40, n=n))
    gradients = torch.autograd.grad(output.sum() + dense.sum(), inputs)
    assert [x.dtype for x in gradients] == [F32, BF16, F32]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("path", DROPOUT_PATHS)
def test_checkpointing_repeats_the_dropout_mask(path, use_reentrant):
    if path[0] == "efficient":
        path = ("auto", *path[1:])  # which takes it in rows, since packed it has no dropout
    (query, key, value), cu_seqlens = packed(*path[1:])
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def attention(*inputs):
        return softmax_n_attention_varlen(*inputs, cu_seqlens, 40, 0.3, n=0.5)

    results = []
    with attention_backend(path[0]):
        for run in (attention, lambda *inputs: checkpoint(attention, *inputs, use_reentrant=use_reentrant)):
            torch.manual_seed(0)
            for x in inputs:
                x.grad = None
            output = run(*inputs)
            output.square().sum().backward()
            results.append([output, *(x.grad for x in inputs)])
    if path[1] == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    else:  # the kernels add up the gradient of query in any order
        assert torch.equal(results[0][0], results[1][0])
        assert_close(results[0], results[1])


@pytest.mark.parametrize("path", paths({"cpu": [F32]}, {"cudnn": [BF16], "flash": [BF16], "efficient": [F32]}))
def test_second_gradient_raises(path):
    inputs = leaves(path)
    with attention_backend(path[0]):
        (gradient,) = torch.autograd.grad(softmax_n_attention(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for aten::.* is not implemented"):
        gradient.sum().backward()


def test_second_gradient_of_the_plain_formula():
    inputs = [x[:1, :1, :3, :4].detach().requires_grad_() for x in dense_case("plain")[0]]
    with attention_backend("eager"):
        assert torch.autograd.gradgradcheck(lambda *x: softmax_n_attention(*x, n=0.5), inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's operator has no batching rule
def test_torch_func():
    inputs = [x.detach() for x in leaves(("cpu", "cpu", F32))]

    def loss(*one):
        return softmax_n_attention(*(x[None] for x in one), n=0.5).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*inputs)
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(softmax_n_attention(*inputs, n=0.5).square().sum(), inputs)
    assert_close(gradients, expected)


def test_exports_hold_standard_operators_only():
    class Attention(torch.nn.Module):
        def forward(self, *inputs):
            return softmax_n_attention(*inputs, n=0.5)

    inputs = tuple(x.detach() for x in leaves(("cpu", "cpu", F32)))
    exported = torch.export.export(Attention(), inputs)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in operators
    assert not any("flash" in operator for operator in operators)
    assert_close(exported.module()(*inputs), Attention()(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, that it is deprecated
        traced = torch.jit.trace(Attention(), inputs)
    assert "flash" not in str(traced.inlined_graph)
    assert_close(traced(*inputs), Attention()(*inputs))


# ------------------------------------------------------------------------------------------------ which backend does it


@pytest.fixture
def fresh_choice():
    """Forget what was chosen and warned of, before and after."""
    caches = (softmax1._chosen, softmax1._changed_operator)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_says_once_what_it_chose(fresh_choice, caplog):
    inputs = [x.detach() for x in leaves(("cpu", "cpu", F32))]
    with caplog.at_level(logging.INFO, logger="softmax1"):
        for _ in range(2):
            softmax_n_attention(*inputs)
            softmax_n_attention(*inputs, dropout_p=0.1)
            softmax_n_attention(*inputs, torch.zeros(12, 12, requires_grad=True))
            with attention_backend("zero_key"):
                softmax_n_attention(*inputs)
    assert [record.getMessage() for record in caplog.records] == [
        "softmax_n attention (dense, torch.float32 on cpu): backend cpu",
        "softmax_n attention (dense, with dropout, torch.float32 on cpu): backend eager",
        "softmax_n attention (dense, masked, torch.float32 on cpu): backend zero_key",
        "softmax_n attention (dense, torch.float32 on cpu): backend zero_key",
    ]


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (BF16, {}, "flash"),
        (F16, {"packed": True, "dropout": True}, "flash"),
        (BF16, {"masked": True}, "efficient"),
        (BF16, {"rectangular": True}, "efficient"),
        (BF16, {"long": 2048}, "flash"),
        (BF16, {"long": 2048, "dropout": True}, "flash"),
        (BF16, {"long": 2048, "packed": True}, "flash"),
        (BF16, {"long": 2048, "single": True}, "flash"),
        (BF16, {"long": 2048, "wide": 160}, "flash"),
        (BF16, {"wide": 256}, "efficient"),
        (F32, {"dropout": True}, "efficient"),
        (F32, {"packed": True}, "efficient"),
        (F32, {"packed": True, "dropout": True}, "zero_key"),  # and then, in rows, "efficient"
        (F64, {}, "zero_key"),
        (F32, {"unsupported_inputs": "for a reason"}, "zero_key"),
    ],
)
def test_choice_on_a_gpu(fresh_choice, monkeypatch, dtype, options, expected):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(
        softmax1,
        "_constant_choice",
        lambda forced, device, *need: softmax1._chosen(forced, torch.device("cuda"), *need),
    )
    length, size = options.get("long", 6), options.get("wide", 64)
    query = torch.empty(2, 4, 1 if options.get("single") else length, size, dtype=dtype, device="meta")
    key = torch.empty(2, 4, 9 if options.get("rectangular") else length, size, dtype=dtype, device="meta")

    def choice(log_n=0.5, card=(8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
        softmax1._chosen.cache_clear()
        call = softmax1._Call(
            torch.ones(6, 6, dtype=torch.bool) if options.get("masked") else None,
            0.1 if options.get("dropout") else 0.0,
            is_causal=bool(options.get("rectangular")),
            scale=None,
            log_n=log_n,
            cu_seqlens=torch.zeros(2, dtype=torch.int32) if options.get("packed") else None,
        )
        return softmax1._choose(query, key, key, call, options.get("unsupported_inputs"))

    assert choice() == choice(log_n=0.0) == expected
    hopper = "cudnn" if "long" in options and not options.keys() & {"packed", "single", "wide"} else expected
    assert choice(card=(9, 0)) == choice(card=(10, 0)) == hopper
    torch.use_deterministic_algorithms(True)
    try:
        assert choice(card=(9, 0)) == expected  # cuDNN's backward pass is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    if expected == "flash":  # a Turing card
        assert choice(card=(7, 5)) == ("zero_key" if options.keys() >= {"packed", "dropout"} else "efficient")


def test_forced_backend_says_why_it_cannot():
    inputs = [x.detach() for x in leaves(("cpu", "cpu", F32))]
    for backend, options, reason in (
        ("flash", {}, "does not run on cpu"),
        ("efficient", {}, "does not run on cpu"),
        ("cpu", {"dropout_p": 0.1}, "has no dropout"),
        ("cpu", {"attn_mask": torch.zeros(12, 12, requires_grad=True)}, "no kernel computes the mask's gradient"),
    ):
        with attention_backend(backend), pytest.raises(ValueError, match=f"'{backend}' cannot do this: .*{reason}"):
            softmax_n_attention(*inputs, **options)
    with pytest.raises(ValueError, match="one of auto, cudnn, flash, efficient, cpu, zero_key, eager, got 'fast'"):
        with attention_backend("fast"):
            pass
    assert softmax1._forced == "auto"


@pytest.mark.parametrize("name", ["_no_such_attention", "_scaled_dot_product_flash_attention_for_cpu"])
def test_without_its_operator_there_is_one_warning_and_the_right_numbers(fresh_choice, monkeypatch, name):
    inputs = [x.detach() for x in leaves(("cpu", "cpu", F64))]
    monkeypatch.setitem(softmax1._OPERATORS, "cpu", {name: (9, 2)})  # with more arguments than any has
    with pytest.warns(UserWarning, match="does without its 'cpu' backend") as caught:
        results = [softmax_n_attention(*inputs, n=0.5, is_causal=causal) for causal in (False, True, False)]
        softmax_n_attention(*(x.float() for x in inputs), n=0.5)
    assert len(caught) == 1
    assert_close(results[0], definition(*inputs, 0.5))
    with attention_backend("cpu"), pytest.raises(ValueError, match="lacks the operator"):
        softmax_n_attention(*inputs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cudnn", BF16), ("flash", BF16), ("efficient", F32), ("efficient", F16)]
)
def test_operators_of_a_gpu_take_what_we_give_them(backend, dtype, compiled):
    """On tensors without data: the schemas, shapes and dtypes of every call, forward and backward."""
    attention = softmax1._stock_attention
    if compiled:
        attention = torch.compile(attention, backend="aot_eager", fullgraph=True)
    mask = torch.empty(2, 1, 1, 50, dtype=torch.bool, device="meta")
    cu_seqlens = torch.empty(6, dtype=torch.int32, device="meta")

    def tensors(*shapes):
        return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]

    dense, packed = ((2, 4, 50, 64), (2, 2, 50, 64), (2, 2, 50, 64)), ((90, 4, 20), (90, 2, 20), (90, 2, 12))
    for shapes, options, rest in (
        (dense, (mask if backend == "efficient" else None, 0.1, False, None, -0.7), ()),
        (dense, (None, 0.0, True, 0.3, 0.0), ()),
        (dense, (None, 0.0, False, None, "sinks"), ()),
        (packed, (None, 0.1, False, None, 0.0), (cu_seqlens, 30)),
        (packed, (None, 0.0, True, 0.3, -math.inf), (cu_seqlens, 30)),
        (packed, (None, 0.0, True, 0.3, "sinks"), (cu_seqlens, 30)),
    ):
        if backend == "cudnn" and rest:
            continue  # it is called for dense attention only
        torch.compiler.reset()
        inputs = tensors(*shapes)
        sinks = torch.empty(4, device="meta", requires_grad=True)
        options = [sinks if option == "sinks" else option for option in options]
        output = attention(backend, *inputs, softmax1._Call(*options, True, *rest))
        assert (output.shape, output.dtype) == ((*inputs[0].shape[:-1], inputs[2].shape[-1]), dtype)
        leaves = [*inputs, sinks] if options[4] is sinks else inputs
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in leaves]


# -------------------------------------------------------------------------------------------------------- whole models

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
SMALL |= {"intermediate_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def model_and_first_position(name, n):
    torch.manual_seed(0)
    if name == "roberta":
        config = RobertaSoftmaxNConfig(softmax_n=n, max_position_embeddings=66, type_vocab_size=1, **SMALL)
        return RobertaSoftmaxNForMaskedLM(config).eval(), 2
    if name == "gpt2":
        config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
        return apply_softmax_n(GPT2LMHeadModel(config).eval(), n), 0
    return apply_softmax_n(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval(), n), 0


def packed_batch(first_position):
    lengths = [5, 1, 9, 3]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return lengths, {
        "input_ids": torch.randint(5, 99, (1, 18), generator=torch.Generator().manual_seed(3)),
        "position_ids": torch.cat([torch.arange(length) + first_position for length in lengths])[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 9,
        "max_length_k": 9,
    }


@pytest.mark.parametrize("n", [0.0, 0.5])
@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama", "llama with a mask"])
def test_packed_model_equals_its_sequences_alone(name, n):
    model, first_position = model_and_first_position(name, n)
    lengths, batch = packed_batch(first_position)
    # Without a cache, transformers gives a decoder a mask that keeps the sequences apart, beside cu_seqlens.
    extra = {"use_cache": False} if name == "llama with a mask" else {}
    with torch.no_grad():
        together = model(**batch, **extra).logits[0]
        alone = [model(input_ids=part).logits[0] for part in batch["input_ids"].split(lengths, 1)]
    assert_close(together, torch.cat(alone))


def test_mask_beside_cu_seqlens_lets_nothing_through():
    model, _ = model_and_first_position("roberta", 1.0)
    _, batch = packed_batch(2)
    attention_mask = torch.ones(1, 18, dtype=torch.long)
    attention_mask[0, -1] = 0
    with torch.no_grad():
        together = model(**batch, attention_mask=attention_mask).logits[0]
        alone = [model(input_ids=part).logits[0] for part in batch["input_ids"][:, :17].split([5, 1, 9, 2], 1)]
    assert_close(together[:17], torch.cat(alone))


def test_packed_model_shows_no_weights():
    model, _ = model_and_first_position("roberta", 1.0)
    with pytest.raises(ValueError, match="use padded batches"):
        model(**packed_batch(2)[1], output_attentions=True)


def test_packed_softmax0_equals_stock_roberta():
    torch.manual_seed(0)
    stock = RobertaForMaskedLM(RobertaConfig(max_position_embeddings=66, type_vocab_size=1, **SMALL)).eval()
    model, _ = model_and_first_position("roberta", 0.0)
    lengths, batch = packed_batch(2)
    with torch.no_grad():
        alone = [stock(input_ids=part).logits[0] for part in batch["input_ids"].split(lengths, 1)]
        assert_close(model(**batch).logits[0], torch.cat(alone))


def test_a_second_copy_in_one_process():
    # As transformers loads the copy that travels with a model.
    spec = importlib.util.spec_from_file_location("transformers_modules.copy.softmax1", softmax1.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
        inputs = leaves(("cpu", "cpu", F32))
        results = [module.softmax_n_attention(*inputs, n=0.5) for module in (softmax1, copy)]
        assert torch.equal(*results)
        gradients = [torch.autograd.grad(result.sum(), inputs) for result in results]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    finally:
        del sys.modules[spec.name]


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.parametrize("path", paths({}, {"flash": [BF16], "efficient": [F32], "zero_key": [F32]}))
def test_packed_never_waits_for_the_gpu(path):
    backend, device, dtype = path
    dropout_p = 0.0 if backend == "efficient" else 0.1  # which it cannot do
    inputs, cu_seqlens = packed(device, dtype)
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])
    sinks = SINKS.exp().float().to(device).requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with attention_backend(backend):
            for n in (0.0, 1.0, sinks):
                leaves = [*inputs, n] if isinstance(n, torch.Tensor) else inputs
                output = softmax_n_attention_varlen(*inputs, cu_seqlens, 40, dropout_p, n=n)
                torch.autograd.grad(output, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", paths({}, {"flash": [BF16], "efficient": [F32]}))
def test_packed_in_a_cuda_graph(path):
    """A captured step, replayed on other sequences of the same total, equals the same step run eagerly."""
    backend, device, dtype = path
    inputs, cu_seqlens = packed(device, dtype)
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])

    sinks = SINKS.float().to(device).requires_grad_()

    def step():
        output = softmax_n_attention_varlen(*inputs, cu_seqlens, 64, log_n=sinks)
        return [output, *torch.autograd.grad(output, [*inputs, sinks], upstream)]

    with attention_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        lengths = torch.tensor([3, 60, 5, 20, 2, 0, 0, 0, 0, 0])  # 90 tokens, as LENGTHS has
        cu_seqlens.copy_(F.pad(lengths.cumsum(0), (1, 0)))
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        graph.replay()
        captured = [x.clone() for x in captured]
        assert_close(captured, step())


@pytest.mark.parametrize("path", paths({}, {"flash": [BF16], "auto": [F32]}))
def test_dropout_in_a_cuda_graph_differs_from_replay_to_replay(path):
    backend, device, dtype = path
    inputs, cu_seqlens = packed(device, dtype)
    inputs = [x.requires_grad_() for x in inputs]

    def step():
        output = softmax_n_attention_varlen(*inputs, cu_seqlens, 40, 0.3)
        return output, torch.autograd.grad(output, inputs, output.detach())[2]

    with attention_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.clone() for x in captured])
    assert not torch.equal(replays[0][0], replays[1][0])
    # y . dy, summed, is v . dv, summed, for one and the same mask: the backward pass saw the mask of the forward pass.
    for output, gradient in replays:
        left = output.double().square().sum()
        right = (inputs[2].detach().double() * gradient.double()).sum()
        # Equal but for rounding, far under this; another mask would change it by some p / (1 - p) = 43 %.
        assert abs(left - right) <= torch.finfo(BF16).eps * left


# --------------------------------------------------------------------------------------- arguments that mean nothing


@pytest.mark.parametrize("n", [0.0, 1.0])
def test_shapes_and_masks_that_mean_nothing_are_refused(n):
    """Each of these gave numbers once."""
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"query and key need the same size.*\(1, 2, 4, 16\), \(1, 2, 4, 8\)"):
        softmax_n_attention(x, x[..., :8], x, n=n)
    with pytest.raises(ValueError, match="key and value the same length"):
        softmax_n_attention(x, x, torch.cat([x, x], 2), n=n)
    with pytest.raises(ValueError, match=r"attn_mask is boolean, or floating point .* got torch.int64"):
        softmax_n_attention(x, x, x, torch.ones(4, 4, dtype=torch.int64), n=n)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="query and key need the same size"):
        softmax_n_attention_varlen(x[0], x[0, ..., :8], x[0], bounds, 4, n=n)
    with pytest.raises(ValueError, match=r"got \(1, 2, 4, 16\), \(1, 2, 4, 16\), \(1, 2, 4, 16\)$"):
        softmax_n_attention_varlen(x, x, x, bounds, 4, n=n)


@pytest.mark.parametrize("n", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_causal_mask_with_a_scale_that_is_not_positive(scale, n):
    """What torch's CPU kernel gets wrong reaches it by no way: a sequence alone, and two packed ones."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    scores = (query @ key.mT * scale).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    expected = softmax_n(scores, n) @ value
    assert_close(softmax_n_attention(query, key, value, is_causal=True, scale=scale, n=n), expected)
    twice = [torch.cat([x[0], x[0]], 1).transpose(0, 1) for x in (query, key, value)]
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32)
    both = softmax_n_attention_varlen(*twice, bounds, 5, is_causal=True, scale=scale, n=n)
    assert_close(both.transpose(0, 1), torch.cat([expected[0], expected[0]], 1))


def test_float16_that_materialises_its_weights_scales_before_it_overflows():
    large = torch.full((1, 1, 4, 64), 40.0, dtype=F16)  # scores of 12,800, and of 102,400 without their scale
    with attention_backend("eager"):
        assert_close(softmax_n_attention(large, large, large, dropout_p=0.0, n=1.0), large)


@pytest.mark.parametrize("n", [0.0, 1.0])
def test_packed_input_without_tokens_keeps_its_gradient(n):
    query = torch.zeros(0, 2, 8, requires_grad=True)
    output = softmax_n_attention_varlen(query, query, query, torch.zeros(1, dtype=torch.int32), 0, n=n)
    assert output.shape == (0, 2, 8) and output.requires_grad
    output.sum().backward()
    assert query.grad.shape == query.shape


@pytest.mark.filterwarnings("ignore")  # tracing warns of what it makes constant
@pytest.mark.parametrize("attention", ["softmax_n", "softmax_n_eager"])
def test_a_traced_model_computes_the_same_for_other_shapes(attention):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model = apply_softmax_n(RobertaForMaskedLM(RobertaConfig(**size, vocab_size=50)).eval(), 1.0)
    model.set_attn_implementation(attention)
    ids, other = torch.randint(5, 50, (2, 7)), torch.randint(5, 50, (3, 9))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    traced = torch.jit.trace(Logits(), ids, check_trace=False)
    with torch.no_grad():
        assert_close(traced(other), model(other).logits)


# ------------------------------------------------------------------------------------------------------- learned sinks


@pytest.mark.parametrize("layout", ["dense", "masked", "causal", "shared heads", "packed"])
@pytest.mark.parametrize("backend", ["cpu", "zero_key", "eager"])
def test_gradient_of_sinks_by_finite_differences(backend, layout):
    torch.manual_seed(0)
    shapes = [(2, heads, 3, 5) for heads in ((4, 2, 2) if layout == "shared heads" else (4, 4, 4))]
    inputs = [torch.randn(shape, dtype=F64).requires_grad_() for shape in shapes]
    mask = torch.tensor([[True, True, False], [True] * 3])[:, None, None] if layout == "masked" else None
    bounds = torch.tensor([0, 1, 3, 3, 6], dtype=torch.int32)

    def attention(query, key, value, sinks):
        if layout == "packed":
            rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            return softmax_n_attention_varlen(*rows, bounds, 3, log_n=sinks)
        shared = layout == "shared heads"
        return softmax_n_attention(query, key, value, mask, 0.0, layout == "causal", log_n=sinks, enable_gqa=shared)

    with attention_backend(backend):
        assert torch.autograd.gradcheck(attention, [*inputs, SINKS.clone().requires_grad_()])


@pytest.mark.parametrize("path", SOME_PATHS + ONLY_DENSE)
def test_n_and_its_logarithm_and_both_shapes_are_one_thing(path):
    backend, device, dtype = path
    inputs = [x.detach() for x in leaves(path)]
    n = SINKS.exp().to(device).requires_grad_()
    upstream = torch.randn(4, 4, 12, 16, device=device).to(dtype)
    with attention_backend(backend):
        output = softmax_n_attention(*inputs, n=n)
        (gradient,) = torch.autograd.grad(output, n, upstream)
        for sinks in (SINKS.to(device), SINKS.to(device)[None, :, None, None]):
            sinks = sinks.clone().requires_grad_()
            assert_close(softmax_n_attention(*inputs, log_n=sinks), output)
            (other,) = torch.autograd.grad(softmax_n_attention(*inputs, log_n=sinks), sinks, upstream)
            assert other.shape == sinks.shape
            assert_close(other.reshape(4), gradient * n.detach(), rtol=1e-4, atol=1e-4)
        for float_n in (0.5, 3.0):  # the same number for every head is that number
            alike = torch.full((4,), float_n, device=device)
            eps = torch.finfo(dtype).eps
            assert_close(
                softmax_n_attention(*inputs, n=alike),
                softmax_n_attention(*inputs, n=float_n),
                rtol=8 * eps,
                atol=8 * eps,
            )
            assert torch.equal(
                softmax_n_attention(*inputs, log_n=math.log(float_n)), softmax_n_attention(*inputs, n=float_n)
            )


@pytest.mark.parametrize("path", PATHS + ONLY_DENSE)
def test_a_head_without_sink_is_softmax(path):
    backend, device, dtype = path
    inputs = [x.requires_grad_() for x in leaves(path)]
    stock = F.scaled_dot_product_attention(*inputs)
    upstream = torch.randn_like(stock)
    for name, values in (("n", [0.0, 0.0, 2.0, 1.0]), ("log_n", [-math.inf, -math.inf, 0.7, 0.0])):
        sinks = torch.tensor(values, device=device, requires_grad=True)
        with attention_backend(backend):
            output = softmax_n_attention(*inputs, **{name: sinks})
            gradients = torch.autograd.grad(output, [*inputs, sinks], upstream)
        eps = torch.finfo(dtype).eps
        close = {"rtol": 16 * eps, "atol": 16 * eps} if backend != "efficient" else {"rtol": 1e-3, "atol": 1e-3}
        assert_close(output[:, :2], stock[:, :2], **close)
        assert (output - stock)[:, 2:].abs().max() > 0.1
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[3][:2].any() and gradients[3][2:].all()


@pytest.mark.parametrize("packed_ones", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_sinks_under_torch_compile(dynamic, packed_ones):
    (query, key, value), cu_seqlens = packed(dtype=F32)
    inputs = [x.requires_grad_() for x in (query, key, value, SINKS.float())]

    def attention(query, key, value, sinks):
        if packed_ones:
            return softmax_n_attention_varlen(query, key, value, cu_seqlens, 40, log_n=sinks)
        return softmax_n_attention(*(x.transpose(0, 1)[None] for x in (query, key, value)), log_n=sinks)

    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)(*inputs)
    eager = attention(*inputs)
    upstream = torch.randn_like(eager)
    assert_close(compiled, eager)
    assert_close(torch.autograd.grad(compiled, inputs, upstream), torch.autograd.grad(eager, inputs, upstream))


@pytest.mark.filterwarnings("ignore")  # torch's operator has no batching rule, and torch.jit is deprecated
def test_sinks_compose():
    """Checkpoints, torch.func, torch.export, torch.jit.trace and autocast: as without."""
    inputs, sinks = [x.detach() for x in leaves(("cpu", "cpu", F32))], SINKS.float().requires_grad_()
    upstream = torch.randn(4, 4, 12, 16)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(sinks.detach().clone())

        def forward(self, *inputs):
            return softmax_n_attention(*inputs, log_n=self.sinks)

    module = Attention()
    output = module(*inputs)
    (expected,) = torch.autograd.grad(output, module.sinks, upstream)
    again = checkpoint(module, *inputs, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, module.sinks, upstream)[0], expected)

    def loss(sinks, upstream, *one):
        return (softmax_n_attention(*(x[None] for x in one), log_n=sinks) * upstream).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(sinks.detach(), upstream, *inputs)
    assert each.shape == (4, 4)
    assert_close(each.sum(0), expected)
    shifts = torch.tensor([0.0, 2.0])[:, None]
    twice = [torch.stack([x, x]) for x in inputs]  # two models at once
    several = torch.func.vmap(lambda sinks, *x: softmax_n_attention(*x, log_n=sinks))(sinks.detach() + shifts, *twice)
    assert_close(several[0], output)
    assert_close(several[1], softmax_n_attention(*inputs, log_n=sinks + 2))
    exported = torch.export.export(module, tuple(inputs))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in operators
    assert_close(exported.module()(*inputs), output)
    traced = torch.jit.trace(module, tuple(inputs))
    assert "flash" not in str(traced.inlined_graph)
    assert_close(traced(*(x[:3, :, :7] for x in inputs)), module(*(x[:3, :, :7] for x in inputs)))
    with torch.autocast("cpu", BF16):
        cast = module(*inputs)
    assert cast.dtype == BF16
    assert torch.equal(cast, softmax_n_attention(*(x.to(BF16) for x in inputs), log_n=sinks))


def test_sinks_that_do_not_fit_are_refused():
    inputs, bounds = [x.detach() for x in leaves(("cpu", "cpu", F32))], torch.tensor([0, 12], dtype=torch.int32)
    for sinks in (torch.zeros(3), torch.zeros(()), torch.zeros(1, 4, 1), torch.zeros(4, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"one number for each of the 4 heads of query, .* got \("):
            softmax_n_attention(*inputs, log_n=sinks)
        with pytest.raises(ValueError, match="one number for each of the 4 heads of query"):
            softmax_n_attention_varlen(*(x[0].transpose(0, 1) for x in inputs), bounds, 12, n=sinks)
    for both in ({"n": 2.0}, {"n": torch.ones(4)}):
        with pytest.raises(ValueError, match="not both"):
            softmax_n_attention(*inputs, **both, log_n=0.0)
    for log_n in (math.inf, math.nan, "0", True):
        with pytest.raises(ValueError, match="real number log_n, or -inf"):
            softmax_n_attention(*inputs, log_n=log_n)
    assert torch.equal(softmax_n_attention(*inputs, log_n=-math.inf), softmax_n_attention(*inputs, n=0.0))


@pytest.mark.parametrize("dtype", EVERY)
def test_the_function_takes_a_tensor(dtype):
    scores = dense_case("plain")[0][0].to(dtype)
    for n in (SINKS.exp()[:, None, None], SINKS.exp()[None, :, None, None]):
        expected = scores.double().exp() / (n + scores.double().exp().sum(-1, keepdim=True))
        for weights in (softmax_n(scores, n), softmax_n(scores, log_n=n.log())):
            assert weights.dtype == dtype
            assert_close(weights.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)
    n = torch.tensor([[[0.0]], [[1e-3]], [[1.0]], [[1e30]]]).requires_grad_()
    weights = softmax_n(scores[:1], n)
    eps = torch.finfo(dtype).eps
    assert_close(weights[:, 0], torch.softmax(scores[:1, 0], -1), rtol=8 * eps, atol=eps)
    (gradient,) = torch.autograd.grad(weights.float().square().sum(), n)
    assert gradient.isfinite().all()
