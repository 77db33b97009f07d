"""softmax_n and its attention against independent oracles: mpmath, closed forms, softmax identities, stock models."""

import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from softmax1 import (
    RobertaSoftmaxNConfig,
    RobertaSoftmaxNForMaskedLM,
    RobertaSoftmaxNModel,
    apply_softmax_n,
    softmax1,
    softmax_n,
    softmax_n_attention,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NS = [0.37, 1.0, 5.0]


def definition(x: torch.Tensor, n: float) -> torch.Tensor:
    """The definition as it is written, in float64; only for moderate logits."""
    exponentials = x.double().exp()
    return exponentials / (n + exponentials.sum(-1, keepdim=True))


def attention_definition(query, key, value, n, mask=None, scale=None):
    """softmax_n attention as it is written, in float64. `mask` is boolean."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    exponentials = scores.exp()
    if mask is not None:
        exponentials = exponentials * mask
    return exponentials / (n + exponentials.sum(-1, keepdim=True)) @ value


def plain_attention(query, key, value, n, mask=None):
    """The plain formula in the dtype of its input: the yardstick of the 2x rule."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return softmax_n(scores, n) @ value


# ------------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("n", [*NS, 1e-30, 1e30])
@pytest.mark.parametrize("shift", [0.0, -20.0, 710.0, -710.0, 1e4, -1e4])
def test_softmax_n_equals_mpmath(n, shift):
    logits = [shift, shift + 1.5, shift - 2.25]
    with mpmath.workdps(60):
        exponentials = [mpmath.exp(mpmath.mpf(x)) for x in logits]
        expected = [float(e / (mpmath.mpf(n) + sum(exponentials))) for e in exponentials]
    result = softmax_n(torch.tensor(logits, dtype=torch.float64), n)
    assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-300)


def test_closed_forms():
    # One logit: softmax1 is the logistic function. Two zeros: 1 / (n + 2).
    x = torch.linspace(-30, 30, 13, dtype=torch.float64)
    assert_close(softmax1(x[:, None])[:, 0], torch.sigmoid(x))
    assert_close(softmax_n(torch.zeros(2), 3.0), torch.full((2,), 0.2))
    assert_close(softmax_n(torch.zeros(4), 0.5).sum(), torch.tensor(4 / 4.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_in_every_dtype(dtype):
    # All logits far below 0: nothing is attended to, and no NaN, where softmax would give 1/2 each.
    assert softmax1(torch.full((2,), -1e4, dtype=dtype)).tolist() == [0.0, 0.0]
    # All logits far above 0: softmax.
    assert softmax1(torch.full((2,), 1e4, dtype=dtype)).tolist() == [0.5, 0.5]
    assert softmax1(torch.full((2,), 710.0, dtype=dtype)).tolist() == [0.5, 0.5]
    assert softmax1(torch.zeros(1, dtype=dtype)).tolist() == [0.5]
    assert softmax1(torch.tensor([-math.inf, 0.0], dtype=dtype)).tolist() == [0.0, 0.5]
    assert softmax1(torch.zeros(3, dtype=dtype)).dtype == dtype


def test_float16_keeps_rows_below_minus_11():
    # Shifted by max(x), exp(-max) of this row overflows float16 and the row is lost.
    x = torch.tensor([-12.0, -13.0], dtype=torch.float16)
    assert_close(softmax1(x).double(), definition(x, 1.0), rtol=2**-10, atol=6e-8)
    assert softmax1(x)[0] > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", NS)
def test_softmax_n_within_one_rounding_of_the_definition(dtype, n):
    torch.manual_seed(0)
    x = (torch.randn(50, 7) * 3).to(dtype)
    # float32 and float64 do several roundings, half precision (computed in float32) one.
    epsilons = 8 if dtype in (torch.float32, torch.float64) else 1
    tiny = torch.finfo(dtype).smallest_normal
    assert_close(softmax_n(x, n).double(), definition(x, n), rtol=epsilons * torch.finfo(dtype).eps, atol=tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_row_is_zero_with_gradient_zero(dtype):
    x = torch.full((2, 3), -math.inf, dtype=dtype, requires_grad=True)
    result = softmax1(x)
    result.sum().backward()
    assert result.tolist() == [[0.0] * 3] * 2
    assert x.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_n0_is_torch_softmax_bit_for_bit(dtype):
    x = torch.randn(5, 9).to(dtype)
    assert torch.equal(softmax_n(x, 0), torch.softmax(x, -1))
    assert torch.equal(softmax_n(x, 0, dim=0, dtype=torch.float64), torch.softmax(x, 0, torch.float64))


@pytest.mark.parametrize("n", NS)
def test_gradient_of_softmax_n(n):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax_n(x, n), x)


def test_dim_dtype_empty_and_no_mutation():
    x = torch.randn(3, 4)
    before = x.clone()
    assert_close(softmax_n(x, 2.0, dim=0), softmax_n(x.T, 2.0).T)
    assert softmax1(x, dtype=torch.float64).dtype == torch.float64
    assert softmax1(torch.tensor([1, 2]), dtype=torch.float32).dtype == torch.float32
    assert softmax1(torch.zeros(2, 0)).shape == (2, 0)
    assert softmax1(torch.tensor(0.0)).item() == 0.5
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [-1, -1e-9, math.nan, math.inf, "1", None, True])
def test_bad_n_raises(n):
    q = torch.zeros(1, 1, 2, 4)
    for call in (lambda: softmax_n(torch.zeros(2), n), lambda: softmax_n_attention(q, q, q, n=n)):
        with pytest.raises(ValueError, match="finite real number n >= 0"):
            call()
    with pytest.raises(ValueError, match="finite real number n >= 0"):
        RobertaSoftmaxNConfig(softmax_n=n)


def test_results_are_dense_and_dim_is_checked():
    assert softmax_n(torch.randn(2, 3)).is_contiguous() and softmax_n(torch.randn(2, 3), dim=0).is_contiguous()
    with pytest.raises(IndexError):
        softmax_n(torch.randn(()), dim=3)


def test_integer_input_raises():
    with pytest.raises(TypeError, match="floating point"):
        softmax1(torch.tensor([1, 2]))


# --------------------------------------------------------------------------------------------------------- attention


def random_qkv(dtype=torch.float64, length=5, keys=7, heads=3, size=8, samples=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(samples, heads, length, size), (samples, heads, keys, size), (samples, heads, keys, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def padding_mask(keys=7):
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., 4:] = False
    return mask


@pytest.mark.parametrize("n", [0.0, *NS])
def test_attention_equals_definition(n):
    query, key, value = random_qkv()
    mask = padding_mask()
    for attn_mask, expected_mask in ((None, None), (mask, mask), (torch.zeros(()).masked_fill(~mask, -math.inf), mask)):
        result = softmax_n_attention(query, key, value, attn_mask, n=n)
        assert_close(result, attention_definition(query, key, value, n, expected_mask), rtol=1e-12, atol=1e-14)
    square = random_qkv(keys=5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert_close(softmax_n_attention(*square, is_causal=True, n=n), attention_definition(*square, n, causal))
    assert_close(softmax_n_attention(*square, scale=0.3, n=n), attention_definition(*square, n, scale=0.3))


@pytest.mark.parametrize("n", NS)
def test_attention_with_additive_bias_and_broadcast_mask(n):
    query, key, value = random_qkv()
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    scores = query @ key.transpose(-2, -1) / 8**0.5 + bias
    assert_close(softmax_n_attention(query, key, value, bias, n=n), definition(scores, n) @ value)
    one_column = torch.tensor([True, False]).view(2, 1, 1, 1)  # broadcasts over the keys: sample 1 is masked whole
    result = softmax_n_attention(query, key, value, one_column, n=n)
    assert_close(result[0], attention_definition(query, key, value, n)[0])
    assert not result[1].any()


@pytest.mark.parametrize("n", NS)
def test_attention_is_softmax_attention_times_sigmoid_of_lse(n):
    # n = 1: softmax1 attention = softmax attention * sigmoid(lse). Any n: lse - log n.
    query, key, value = random_qkv()
    lse = torch.logsumexp(query @ key.transpose(-2, -1) / 8**0.5, -1, keepdim=True)
    stock = F.scaled_dot_product_attention(query, key, value)
    assert_close(softmax_n_attention(query, key, value, n=n), stock * torch.sigmoid(lse - math.log(n)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "logits"), [(5, 1.0), (1, 1.0), (3, -4.0)])
def test_attention_forward_and_gradients_within_the_2x_rule(dtype, n, masked, length, logits):
    """Error against the float64 definition at most 2x (gradients 3x) that of the plain formula in the same dtype."""
    inputs = random_qkv(dtype, length, length, samples=32)  # many, so that both maxima are typical ones
    if logits < 0:  # push the scores down, where the null key takes most of the mass and a missing sink would show
        inputs[0][..., 0], inputs[1][..., 0] = -8.0, 4.0
    mask = torch.ones(32, 1, 1, length, dtype=torch.bool)
    if masked:
        mask[0, ..., -1] = False  # with length 1: a fully masked row
    upstream = torch.randn(32, 3, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(function, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]

    expected = run(lambda q, k, v: attention_definition(q, k, v, n, mask), torch.float64)
    plain = run(lambda q, k, v: plain_attention(q, k, v, n, mask), dtype)
    ours = run(lambda q, k, v: softmax_n_attention(q, k, v, mask if masked else None, n=n), dtype)
    for factor, truth, yardstick, result in zip((2, 3, 3, 3), expected, plain, ours, strict=True):
        assert result.dtype == dtype
        if dtype == torch.float64:  # the reference itself is no better
            assert_close(result, truth, rtol=1e-12, atol=1e-13)
            continue
        floor = torch.finfo(dtype).eps * truth.abs().max().item()
        error = (result.double() - truth).abs().max().item()
        assert error <= factor * (yardstick.double() - truth).abs().max().item() + floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_fully_masked_row(dtype):
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(dtype))
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    for attn_mask in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)):
        output = softmax_n_attention(query, key, value, attn_mask, n=1.0)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
        assert not output.any()
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("n", NS)
def test_attention_shares_heads(n):
    query, key, value = random_qkv(heads=4)
    key, value = key[:, :2], value[:, :2]
    expected = attention_definition(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), n)
    assert_close(softmax_n_attention(query, key, value, n=n, enable_gqa=True), expected)


def test_attention_dropout_in_distribution():
    # Mean of many dropped-out outputs is the output without dropout: dropout scales the kept weights by 1 / (1 - p).
    torch.manual_seed(0)
    query, key, value = random_qkv(torch.float32)
    runs = torch.stack([softmax_n_attention(query, key, value, dropout_p=0.3, n=1.0) for _ in range(4000)])
    standard_error = runs.std(0) / len(runs) ** 0.5
    deviation = (runs.mean(0) - softmax_n_attention(query, key, value, n=1.0)) / standard_error
    assert runs.std(0).min() > 0
    assert deviation.abs().max() < 5  # 240 entries: a 5 sigma outlier has odds of about 1 in 10,000


def test_attention_leaves_its_arguments_alone():
    inputs = [*random_qkv(), padding_mask()]
    before = [tensor.clone() for tensor in inputs]
    softmax_n_attention(*inputs, n=0.5)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    with pytest.raises(ValueError, match="exclude each other"):
        softmax_n_attention(*inputs, is_causal=True)


# ------------------------------------------------------------------------------------------------------ whole models

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ROBERTA = {**SMALL, "max_position_embeddings": 66, "type_vocab_size": 1}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 2}


def small_models():
    torch.manual_seed(0)
    return {
        "bert": BertForMaskedLM(BertConfig(**SMALL)).eval(),
        "roberta": RobertaForMaskedLM(RobertaConfig(**ROBERTA)).eval(),
        "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2)).eval(),
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval(),
    }


def batch(padded=True):
    input_ids = torch.randint(5, 99, (3, 9), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[0, 5:] = 0
        attention_mask[2, 8:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_surgery(name):
    model = small_models()[name]
    inputs = batch()
    real = inputs["attention_mask"].bool()
    stock = logits(model, **inputs)
    assert_close(logits(apply_softmax_n(model, 0), **inputs)[real], stock[real], rtol=1e-5, atol=1e-5)
    assert apply_softmax_n(model, 1) is model
    ours = logits(model, **inputs)
    assert (ours - stock)[real].abs().max() > 1e-3
    # The same through the materialised weights, whose rows no longer sum to 1.
    if name == "gpt2":  # does not hand output_attentions on to its attention
        model.set_attn_implementation("softmax_n_eager")
    with torch.no_grad():
        eager = model(**inputs, output_attentions=True)
    model.set_attn_implementation("softmax_n")
    assert_close(eager.logits[real], ours[real], rtol=1e-4, atol=1e-5)
    assert len(eager.attentions) == 2
    row = eager.attentions[0][1, 0].sum(-1)
    assert (row < 0.999).all() and (row > 0).all()
    # Padding does not leak: what stands in padded places changes no real token's logits.
    other = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], 7)}
    assert_close(logits(model, **other)[real], ours[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_surgery_on_decoders_is_causal_and_generates_with_its_cache(name):
    model = apply_softmax_n(small_models()[name], 0.5)
    inputs = batch(padded=False)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = 11
    assert_close(logits(model, input_ids=changed)[:, :-1], logits(model, **inputs)[:, :-1], rtol=0, atol=1e-6)
    with torch.no_grad():
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    input_ids = inputs["input_ids"]
    for _ in range(4):
        input_ids = torch.cat([input_ids, logits(model, input_ids=input_ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, input_ids)


def test_surgery_refuses_what_it_cannot_do():
    deberta = DebertaV2ForMaskedLM(DebertaV2Config(**SMALL))
    with pytest.raises(ValueError, match="DebertaV2ForMaskedLM does not take its attention"):
        apply_softmax_n(deberta, 1)
    with pytest.raises(ValueError, match="needs a transformers model"):
        apply_softmax_n(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="finite real number"):
        apply_softmax_n(deberta, -1)
    model = RobertaForMaskedLM(RobertaConfig(**ROBERTA, attn_implementation="softmax_n"))
    with pytest.raises(ValueError, match="choose n with apply_softmax_n"):
        logits(model, **batch())


def softmax_n_model(n):
    torch.manual_seed(0)
    return RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=n, **ROBERTA)).eval()


def test_n0_equals_stock_roberta_with_the_same_seed():
    torch.manual_seed(0)
    stock = RobertaForMaskedLM(RobertaConfig(**ROBERTA)).eval()
    ours = softmax_n_model(0)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
    assert list(stock.state_dict()) == list(ours.state_dict())
    inputs = batch()
    assert torch.equal(logits(ours, **inputs), logits(stock, **inputs))


@pytest.mark.parametrize("n", [1e-30, 1, "learned"])
def test_a_softmax_model_takes_no_state_dict_of_softmax_n(n, tmp_path):
    ours, stock = softmax_n_model(n), RobertaForMaskedLM(RobertaConfig(**ROBERTA))
    for softmax in (stock, softmax_n_model(0), apply_softmax_n(softmax_n_model(1), 0)):
        with pytest.raises(RuntimeError, match='"softmax_n"'):
            softmax.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=n != "learned")
    softmax_n_model(1).load_state_dict(apply_softmax_n(softmax_n_model(0), 1).state_dict())
    ours.save_pretrained(tmp_path)  # the class without its head, and back
    RobertaSoftmaxNModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    back = RobertaSoftmaxNForMaskedLM.from_pretrained(tmp_path / "base", output_loading_info=True)[1]
    assert not [name for names in back.values() for name in names if "softmax_n" in str(name)]


def test_arms_start_from_the_same_weights():
    a, b = softmax_n_model(0).state_dict(), softmax_n_model(1).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("n", [0.5, 1.0])
def test_save_and_load_keeps_n_and_logits(tmp_path, n):
    model = softmax_n_model(n)
    expected = logits(model, **batch())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "softmax1.py").exists()
    for loaded in (
        RobertaSoftmaxNForMaskedLM.from_pretrained(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="sdpa"),
    ):
        assert loaded.config.softmax_n == n
        assert torch.equal(logits(loaded.eval(), **batch()), expected)


def test_softmax_n_roberta_cannot_be_turned_into_softmax():
    model = softmax_n_model(1)
    with pytest.raises(ValueError, match="silently make it a softmax model"):
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation("softmax_n")
    assert model.config._attn_implementation == "softmax_n"


def test_the_one_file_can_be_installed(tmp_path):
    """What `pip install .` installs is softmax1.py, and nothing else of this project."""
    root = Path(__file__).parent.parent
    for name in ("pyproject.toml", "softmax1.py", "README.md", "LICENSE", "experiment.py"):
        shutil.copy(root / name, tmp_path / name)
    build = [sys.executable, "-c", "import setuptools.build_meta as build; print(build.build_wheel('dist'))"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("softmax1-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".py")] == ["softmax1.py"]
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch" in metadata and "Requires-Dist: transformers" in metadata
