"""How fast it is: our training step, attention and tokenizing beside stock ones, in one process.

    python benchmark.py step            a ladder from the published configuration to ours, one technique a rung
    python benchmark.py attention       softmax_n attention beside softmax attention and other ways to softmax_n
    python benchmark.py tokenize        lines a second and peak memory

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py); `attention` needs neither. Prints tables and writes
benchmark/<what>.json with every single time, and a plot beside it, both with the hardware on them.

What is compared runs on the same input, one behind the other, round after round, so that a noisy machine slows all of
them. A step's ratio is that of the times summed over the rounds, whose batches differ; an attention's is
the median of the rounds' ratios. Behind it stand the extremes over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import command

if __name__ == "__main__":
    command.begin()

import resource  # which Windows lacks

import datasets
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

import record
from corpus import load_data, load_tokenizer, tokenized
from experiment import (
    EFFECTIVE_BATCH_SIZE,
    MAX_LENGTH,
    MLM_PROBABILITY,
    SEED,
    STEPS,
    VOCAB_SIZE,
    accept_packed_batches,
    build_model,
)
from folder import refuse_unwritable
from held_out import evenly_spread
from kurtosis import ActivationKurtosis
from packing import IGNORED, MaskedLMCollator, on_device, summed_loss
from softmax1 import attention_backend, softmax_n_attention
from tables import table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STATISTICS_STEPS = 10  # train_model.py's default: the activations' kurtosis is measured every tenth step
BUCKET = 128  # train_model.py's, for compiled models
LARGE_BATCH = 128  # what the published run asked for, and had no memory for

# Of the training text, which cannot be measured here: the estimate that the projection takes.
PUBLISHED_TOKENS = 36  # real ones a sample

# (dense peak, FLOP/s; memory bandwidth, byte/s; USD an hour), from the makers' data sheets; the A10G's price is that
# of AWS g5.2xlarge as published, the H200's is assumed. Of the peaks, small matrices reach a part: assumed.
DEVICES = {
    "A10G, float32": (31.5e12, 600e9, 1.212),
    "A10G, bfloat16": (70e12, 600e9, 1.212),
    "H200, float32": (67e12, 4.8e12, 4.0),
    "H200, bfloat16": (989e12, 4.8e12, 4.0),
}
REACHED_FLOPS, REACHED_BANDWIDTH = 0.4, 0.8
LAUNCH_SECONDS = 2e-3  # Python, launches and Trainer a step that nothing hides, when the model is captured: assumed

HEADS, HEAD_SIZE = 12, 64  # of the published model


# ------------------------------------------------------------------------------------------------------------ the step


@dataclass
class Rung:
    """A step of the ladder. `statistics_steps` is how seldom the activations are measured."""

    label: str
    step: Callable[[list[dict], bool], None]  # (samples, whether to measure)
    statistics_steps: int


def published_step(
    tokenizer: PreTrainedTokenizerBase, device: torch.device, attention: str, fused: bool
) -> Callable[[list[dict], bool], None]:
    """A training step of the published configuration, made of stock parts: padded, float32, logits of all tokens.

    Args:
        attention: transformers' attn_implementation, "eager" as published or "sdpa".
        fused: fused AdamW and no look at the loss; else, as published, Trainer looks for NaN at every step, which
            waits for the device.
    """
    model = build_model(0, VOCAB_SIZE, tokenizer, seed=SEED).to(device).train()
    model.set_attn_implementation(attention)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0, fused=fused)
    statistics = ActivationKurtosis(model)

    def step(samples: list[dict], measure: bool) -> None:
        batch = on_device(dict(collator([dict(sample) for sample in samples])), device)
        with statistics if measure else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        update(model, optimizer)
        if not fused:
            torch.isnan(loss).item()

    return step


def our_step(
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    softmax_n: float = 0,
    masked_only: bool = True,
    bf16: bool = False,
    compiled: bool = False,
) -> Callable[[list[dict], bool], None]:
    """A training step on a packed batch, as train_model.py does it.

    Args:
        masked_only: the head at the masked positions; else at all of them.
    """
    model = accept_packed_batches(build_model(softmax_n, VOCAB_SIZE, tokenizer, SEED).to(device).train())
    collator = MaskedLMCollator(
        tokenizer, mlm_probability=MLM_PROBABILITY, seed=SEED, packed=True, bucket=BUCKET if compiled else 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0, fused=True)
    statistics = ActivationKurtosis(model)
    fast = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None) if compiled else model

    def step(samples: list[dict], measure: bool) -> None:
        batch = collator(samples)
        if not masked_only:
            batch = with_all_positions(batch)
        batch = on_device(batch, device)
        statistics.packed = batch if measure else None
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            statistics if measure else contextlib.nullcontext(),
        ):
            loss, _ = summed_loss(model if measure else fast, batch)
            loss = loss / batch["masked_tokens"]
        loss.backward()
        update(model, optimizer)

    return step


def with_all_positions(batch: dict) -> dict:
    """A packed batch whose head sees every token."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[0, batch["masked_positions"]] = batch["labels"][0]
    return {**batch, "masked_positions": torch.arange(labels.shape[1]), "labels": labels}


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def ladder(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[Rung]:
    """From the published configuration to ours, one technique a rung."""
    rungs = [
        Rung("published: padded, eager attention", published_step(tokenizer, device, "eager", False), 1),
        Rung("+ fused AdamW, no waiting", published_step(tokenizer, device, "eager", True), 1),
        Rung("+ SDPA attention", published_step(tokenizer, device, "sdpa", True), 1),
        Rung("+ packed, no padding", our_step(tokenizer, device, masked_only=False), 1),
        Rung("+ head at masked positions", our_step(tokenizer, device), 1),
        Rung("+ statistics every 10th step", our_step(tokenizer, device), STATISTICS_STEPS),
        Rung("softmax1 for softmax", our_step(tokenizer, device, 1), STATISTICS_STEPS),
    ]
    # A CPU without these instructions computes bfloat16 by way of float32, slower than float32 itself.
    if device.type == "cuda" or {"amx_bf16", "avx512_bf16"} & set(record.hardware(device).get("instructions", [])):
        rungs.append(Rung("+ bfloat16", our_step(tokenizer, device, 1, bf16=True), STATISTICS_STEPS))
    if device.type == "cuda":
        compiled = our_step(tokenizer, device, 1, bf16=True, compiled=True)
        rungs.append(Rung("+ compiled, CUDA graphs", compiled, STATISTICS_STEPS))
    return rungs


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Seconds until `call` is done, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(call: Callable[[], None], device: torch.device) -> int | None:
    """Bytes of the device that `call` takes on top of what is there before; None on a CPU, where nobody counts them."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compared(seconds: list[float], baseline: list[float]) -> dict:
    """How many times faster than the baseline: ratio of the sums over the rounds, and its extremes over them."""
    ratios = np.array(baseline) / np.array(seconds)
    return {
        "median_seconds": float(np.median(seconds)),
        "times": sum(baseline) / sum(seconds),
        "lowest": float(ratios.min()),
        "highest": float(ratios.max()),
    }


def benchmark_step(args: argparse.Namespace, device: torch.device) -> dict:
    batches, tokenizer = training_batches(args)
    warm_up, *batches = batches
    rungs = ladder(tokenizer, device)
    bytes_taken = {}
    for rung in rungs:  # optimizer moments, allocators, compilers
        rung.step(warm_up, False)
        bytes_taken[rung.label] = peak(lambda rung=rung: rung.step(warm_up, True), device)
    plain = {rung.label: [] for rung in rungs}
    measured = {rung.label: [] for rung in rungs}
    for batch in tqdm(batches, desc="rounds"):
        for rung in rungs:
            measured[rung.label].append(timed(lambda rung=rung, batch=batch: rung.step(batch, True), device))
            if rung.statistics_steps > 1:
                plain[rung.label].append(timed(lambda rung=rung, batch=batch: rung.step(batch, False), device))
    rows = []
    baseline = measured[rungs[0].label]
    for rung in rungs:
        seconds, overhead = measured[rung.label], None
        if rung.statistics_steps > 1:  # one step in so many is measured
            share = 1 / rung.statistics_steps
            pairs = zip(measured[rung.label], plain[rung.label], strict=True)
            seconds = [share * with_statistics + (1 - share) * without for with_statistics, without in pairs]
            overhead = share * (sum(measured[rung.label]) / sum(plain[rung.label]) - 1)
        rows.append(
            {
                "rung": rung.label,
                **compared(seconds, baseline),
                "samples_per_second": EFFECTIVE_BATCH_SIZE * len(seconds) / sum(seconds),
                "statistics_share": overhead,
                "peak_bytes": bytes_taken[rung.label],
                "seconds": seconds,
            }
        )
    masking = MaskedLMCollator(tokenizer, mlm_probability=MLM_PROBABILITY, seed=SEED)
    padded = [masking(batch) for batch in batches]
    lengths = [len(sample["input_ids"]) for batch in batches for sample in batch]
    text = {
        "tokens_a_step": sum(lengths) / len(batches),
        "padded_tokens_a_step": float(np.mean([batch["input_ids"].numel() for batch in padded])),
        "masked_tokens_a_step": float(np.mean([batch["masked_tokens"].item() for batch in padded])),
        "attended_tokens": sum(length**2 for length in lengths) / sum(lengths),  # that a token attends to, on average
    }
    return {
        "text": text,
        "rungs": rows,
        "floor": floor(text, rows, device),
        "memory": memory(tokenizer, [sample for batch in batches for sample in batch]),
        "projection": projection(text),
    }


def training_batches(args: argparse.Namespace) -> tuple[list[list[dict]], PreTrainedTokenizerBase]:
    """One batch more than rounds, of samples drawn from the training text as they come, and the tokenizer."""
    data, _ = load_data(args.data_dir)
    tokenizer = load_tokenizer(args.tokenizer_dir, VOCAB_SIZE)
    wanted = (args.rounds + 1) * EFFECTIVE_BATCH_SIZE
    if len(data["train"]) < wanted:
        sys.exit(f"error: {args.rounds} rounds take {wanted} samples, {args.data_dir} has fewer: give fewer --rounds")
    data["train"] = data["train"].select(np.random.default_rng(0).permutation(len(data["train"]))[:wanted])
    with tempfile.TemporaryDirectory() as scratch:
        ids = tokenized(data, Path(scratch) / "tokenized", tokenizer, MAX_LENGTH)["train"]["input_ids"]
        samples = [{"input_ids": list(sample)} for sample in ids]
    return [
        samples[start : start + EFFECTIVE_BATCH_SIZE] for start in range(0, wanted, EFFECTIVE_BATCH_SIZE)
    ], tokenizer


# ------------------------------------------------------------------------------------- what the arithmetic itself takes


def step_work(tokens: float, masked: float, attended: float) -> tuple[float, float]:
    """(FLOPs, bytes) of our step, at least.

    FLOPs of the matrix products, a multiply and an add each, once forward and twice backward: 12 hidden^2 weights a
    layer and token, attention's two products, and the head at the masked positions. Bytes to and from memory for the
    parameters alone, float32: read forward and backward, gradient written, read for its norm, read and written by the
    clipping, and AdamW reading four and writing three tensors. Activations are small at this batch, and stay in cache.
    """
    hidden, layers = HEADS * HEAD_SIZE, 6
    encoder = tokens * layers * (12 * hidden**2 + 2 * attended * hidden)
    head = masked * (hidden**2 + hidden * VOCAB_SIZE)
    parameters = layers * 12 * hidden**2 + hidden * VOCAB_SIZE
    return 3 * 2 * (encoder + head), 4 * parameters * (2 + 1 + 1 + 2 + 7)


def floor(text: dict, rows: list[dict], device: torch.device) -> dict:
    """The least time that our softmax1 step could take here, from rates measured here, and how far from it it is."""
    flops, moved = step_work(text["tokens_a_step"], text["masked_tokens_a_step"], text["attended_tokens"])
    a, b = torch.randn(1024, 3072, device=device), torch.randn(3072, 3072, device=device)
    big = torch.ones(1 << 27, device=device)  # 512 MiB, beyond every cache
    matmul = min(timed(lambda: a @ b, device) for _ in range(5))
    copying = min(timed(lambda: big[: 1 << 26].copy_(big[1 << 26 :]), device) for _ in range(5))
    rate, bandwidth = 2 * 1024 * 3072**2 / matmul, 2 * (1 << 28) / copying
    seconds = flops / rate + moved / bandwidth
    ours = next(row for row in rows if row["rung"] == "softmax1 for softmax")["median_seconds"]
    return {
        "flops_a_step": flops,
        "bytes_a_step": moved,
        "measured_flops_per_second": rate,
        "measured_bytes_per_second": bandwidth,
        "seconds": seconds,
        "ours_seconds": ours,
        "times_the_floor": ours / seconds,
    }


def memory(tokenizer: PreTrainedTokenizerBase, samples: list[dict]) -> list[dict]:
    """Bytes our float32 step needs at the published batch and at the one the published run had no memory for.

    Weights, gradients and two moments, and what the forward pass keeps for the backward pass: counted, so that it holds
    on any device. The larger batch once of samples as they come, once of nothing but longest ones.
    """
    model = accept_packed_batches(build_model(1, VOCAB_SIZE, tokenizer, SEED)).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    fixed = 16 * sum(parameter.numel() for parameter in model.parameters())
    collator = MaskedLMCollator(tokenizer, mlm_probability=MLM_PROBABILITY, seed=SEED, packed=True)
    longest = {"input_ids": [0, *[5 + i % 1000 for i in range(MAX_LENGTH - 2)], 2]}
    as_they_come = (samples * LARGE_BATCH)[:LARGE_BATCH]
    rows = []
    for label, chosen in (
        ("samples as they come", as_they_come[:EFFECTIVE_BATCH_SIZE]),
        ("samples as they come", as_they_come),
        (f"{MAX_LENGTH} tokens each", [longest] * EFFECTIVE_BATCH_SIZE),
    ):
        kept = {}

        def keep(tensor: Tensor, kept: dict = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = collator(chosen)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = summed_loss(model, batch)
        rows.append(
            {
                "batch": len(chosen),
                "of": label,
                "tokens": batch["tokens"],
                "parameter_bytes": fixed,
                "activation_bytes": sum(kept.values()),
            }
        )
        del loss
    return rows


def projection(text: dict) -> list[dict]:
    """Time and cost of the published number of steps on other devices: roofline, and under the assumptions above."""
    rows = []
    for tokens in (text["tokens_a_step"] / EFFECTIVE_BATCH_SIZE, PUBLISHED_TOKENS):
        for device, (peak_flops, peak_bandwidth, usd_an_hour) in DEVICES.items():
            total = tokens * EFFECTIVE_BATCH_SIZE
            flops, moved = step_work(total, MLM_PROBABILITY * total, text["attended_tokens"])
            roofline = flops / peak_flops + moved / peak_bandwidth
            reached = flops / (REACHED_FLOPS * peak_flops) + moved / (REACHED_BANDWIDTH * peak_bandwidth)
            row = {"device": device, "tokens_a_sample": tokens}
            for name, seconds in (("roofline", roofline), ("assumed", reached + LAUNCH_SECONDS)):
                hours = seconds * STEPS / 3600
                row[name] = {"seconds_a_step": seconds, "hours": hours, "usd": hours * usd_an_hour}
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ attention


LENGTHS = (20, 36, *(64 << power for power in range(8)))  # 20 and 36 tokens: sentences
REFERENCE_ROWS = 64  # queries, evenly spread, whose output is compared with the definition in float64


def peers() -> dict[str, Callable]:
    """Others' ways to the same two functions, of transformers and of packages that are installed here.

    Arguments as in `contestants`. What is found may still refuse this device.
    """
    shape = {"sinks": None, "num_key_value_groups": 1, "training": True}

    def transformers_eager(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        module = SimpleNamespace(**shape | {"sinks": sinks})
        return gpt_oss_attention(module, query, key, value, None, HEAD_SIZE**-0.5)[0].transpose(1, 2)

    def transformers_flex(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        module = SimpleNamespace(**shape)
        return flex_attention_forward(module, query, key, value, None, HEAD_SIZE**-0.5, s_aux=sinks)[0].transpose(1, 2)

    def flash_attention_softmax_n(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        package = importlib.import_module("flash_attention_softmax_n")
        return package.flash_attention_n(query, key, value, softmax_n_param=1)

    def flash_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        attend = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        output = attend(*(x.transpose(1, 2) for x in (query, key, value)), learnable_sink=sinks.to(query.dtype))
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    @cache
    def engine() -> Callable:
        package = importlib.import_module("transformer_engine.pytorch")
        kind = {"softmax_type": "off-by-one", "qkv_format": "bshd", "attn_mask_type": "no_mask"}
        return package.DotProductAttention(HEADS, HEAD_SIZE, attention_dropout=0.0, **kind)

    def transformer_engine(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        output = engine()(*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
        return output.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)

    found = {"sinks, transformers' eager": transformers_eager, "sinks, flex attention": transformers_flex}
    for package, name, way in (
        ("flash_attention_softmax_n", "softmax1, flash-attention-softmax-n", flash_attention_softmax_n),
        ("flash_attn", "sinks, FlashAttention", flash_attention),
        ("transformer_engine", "softmax1, TransformerEngine", transformer_engine),
    ):
        if importlib.util.find_spec(package):
            found[name] = way
    return found


def contestants() -> dict[str, Callable]:
    """Ways to attend, as functions of query, key and value, each (batch, heads, tokens, size), and sinks (heads,).

    The first word of a name says which function it computes: softmax, softmax1, or softmax_n with log n = sinks. The
    first way is PyTorch's softmax.
    """

    def ours(backend: str, learned: bool) -> Callable:
        def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
            with attention_backend(backend):
                return softmax_n_attention(query, key, value, **({"log_n": sinks} if learned else {}))

        return attend

    return {
        "softmax (PyTorch)": lambda query, key, value, sinks: F.scaled_dot_product_attention(query, key, value),
        "softmax1 (ours)": ours("auto", False),
        "softmax1, zero key": ours("zero_key", False),
        "softmax1, eager": ours("eager", False),
        "sinks (ours)": ours("auto", True),
        "sinks, zero key": ours("zero_key", True),
        **peers(),
    }


def function_of(way: str) -> str:
    """softmax, softmax1 or sinks."""
    return way.replace(",", " ").split()[0]


def exact_rows(kind: str, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, upstream: Tensor) -> list[Tensor]:
    """By the definition in float64, for REFERENCE_ROWS queries of the first sample: [output, gradient of the query]."""
    rows = evenly_spread(query.shape[2], REFERENCE_ROWS)
    query, upstream = (x[:1, :, rows].detach().double() for x in (query, upstream))
    key, value = (x[:1].detach().double() for x in (key, value))
    query.requires_grad_()
    log_n = {"softmax": torch.full_like(sinks, -math.inf), "softmax1": torch.zeros_like(sinks), "sinks": sinks}[kind]
    scores = query @ key.transpose(-2, -1) * HEAD_SIZE**-0.5
    denominator = torch.logaddexp(scores.logsumexp(-1, keepdim=True), log_n.detach().double()[:, None, None])
    output = torch.exp(scores - denominator) @ value
    return [output.detach(), torch.autograd.grad(output, query, upstream)[0]]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference in the rows of `exact_rows`, as a share of the largest entry."""
    rows = evenly_spread(found.shape[2], REFERENCE_ROWS)
    return ((found[:1, :, rows].double() - exact).abs().max() / exact.abs().max()).item()


def attention_times(
    ways: dict[str, Callable], length: int, batch: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[tuple[str, str], list[float]], dict[str, int | None], dict[tuple[str, str], float]]:
    """({(way, part): seconds of every round}, {way: bytes taken}, {(way, part): error}).

    The errors are relative_error of the output and of the query's gradient. Failing ways are reported and skipped.
    """
    shape = (batch, HEADS, length, HEAD_SIZE)
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    sinks = torch.linspace(-2, 4, HEADS, device=device).requires_grad_()
    upstream = torch.randn(shape, device=device, dtype=dtype)
    exact = {kind: exact_rows(kind, *qkv, sinks, upstream) for kind in ("softmax", "softmax1", "sinks")}

    @torch.no_grad()
    def forward(name: str) -> Tensor:
        return ways[name](*qkv, sinks)

    def both(name: str) -> Tensor:
        leaves = [*qkv, sinks] if function_of(name) == "sinks" else qkv
        return torch.autograd.grad(ways[name](*qkv, sinks), leaves, upstream)[0]

    parts = {"forward": forward, "forward+backward": both}
    bytes_taken, errors = {}, {}
    for name in ways:  # and the warm-up
        try:
            for (part, run), reference in zip(parts.items(), exact[function_of(name)], strict=True):
                errors[name, part] = relative_error(run(name), reference)
            bytes_taken[name] = peak(partial(both, name), device)
        except Exception as error:  # no memory, or a dtype or device that it does not take: of others' packages, any
            tqdm.write(f"{name} at {length} tokens: {record.one_line(error)}", file=sys.stderr)
    seconds = {(name, part): [] for part in parts for name in bytes_taken}
    for _ in range(rounds):
        for name, part in seconds:
            seconds[name, part].append(timed(partial(parts[part], name), device))
    return seconds, bytes_taken, errors


def benchmark_attention(args: argparse.Namespace, device: torch.device) -> dict:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ways = contestants()
    stock = next(iter(ways))
    rows = []
    for length in tqdm([length for length in LENGTHS if length <= args.max_length], desc="lengths"):
        batch = max(1, min(16, args.max_length // length))  # as many tokens at every length, but no more than 16 rows
        seconds, bytes_taken, errors = attention_times(ways, length, batch, args.rounds, dtype, device)
        for (name, part), times in seconds.items():
            ratios = np.array(times) / np.array(seconds[stock, part])
            rows.append(
                {
                    "length": length,
                    "batch": batch,
                    "way": name,
                    "part": part,
                    "median_seconds": float(np.median(times)),
                    "of_stock": float(np.median(ratios)),
                    "lowest": float(ratios.min()),
                    "highest": float(ratios.max()),
                    "error": errors[name, part],
                    "peak_bytes": bytes_taken[name],
                    "seconds": times,
                }
            )
    return {"dtype": str(dtype).removeprefix("torch."), "heads": HEADS, "head_size": HEAD_SIZE, "attention": rows}


# ----------------------------------------------------------------------------------------------------------- tokenizing


def benchmark_tokenize(args: argparse.Namespace, device: torch.device) -> dict:
    """Tokenize --lines lines, the training text over and over, as train_model.py does, and read some of them again."""
    data, _ = load_data(args.data_dir)
    tokenizer = load_tokenizer(args.tokenizer_dir, VOCAB_SIZE)
    times = math.ceil(args.lines / len(data["train"]))
    text = datasets.concatenate_datasets([data["train"]] * times).select(range(args.lines))
    start_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory(dir=args.output_dir) as scratch:
        needed = 60 * args.lines * 8 * 2
        if shutil.disk_usage(scratch).free < needed:
            sys.exit(f"error: {args.output_dir} has less than the {needed / 1e9:.1f} GB this needs: give fewer --lines")
        start = time.perf_counter()
        result = tokenized(datasets.DatasetDict(train=text), Path(scratch) / "tokenized", tokenizer, MAX_LENGTH)[
            "train"
        ]
        seconds = time.perf_counter() - start
        drawn = np.random.default_rng(0).permutation(len(result))
        order = [
            drawn[start : start + EFFECTIVE_BATCH_SIZE]
            for start in range(0, min(len(drawn), 1000 * EFFECTIVE_BATCH_SIZE), EFFECTIVE_BATCH_SIZE)
        ]
        reading = timed(lambda: [result[batch] for batch in order], torch.device("cpu"))
        written = sum(path.stat().st_size for path in Path(scratch).rglob("*.arrow"))
    return {
        "lines": args.lines,
        "seconds": seconds,
        "lines_per_second": args.lines / seconds,
        "start_bytes": start_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "file_bytes": written,
        "seconds_to_read_a_batch": reading / len(order),
    }


# -------------------------------------------------------------------------------------------------- tables and pictures


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f}"


def step_tables(result: dict) -> str:
    text, bottom = result["text"], result["floor"]
    rungs = [
        [
            row["rung"],
            f"{1e3 * row['median_seconds']:,.1f}",
            f"{row['samples_per_second']:,.1f}",
            f"{row['times']:.2f}",
            f"{row['lowest']:.2f} – {row['highest']:.2f}",
            "–" if row["statistics_share"] is None else f"{100 * row['statistics_share']:.1f} %",
            megabytes(row["peak_bytes"]),
        ]
        for row in result["rungs"]
    ]
    needs = [
        [
            f"{row['batch']} x {row['of']}",
            f"{row['tokens']:,}",
            megabytes(row["parameter_bytes"]),
            megabytes(row["activation_bytes"]),
            f"{(row['parameter_bytes'] + row['activation_bytes']) / 1e9:.1f}",
        ]
        for row in result["memory"]
    ]
    projected = [
        [row["device"], f"{row['tokens_a_sample']:.1f}"]
        + [
            show
            for name in ("roofline", "assumed")
            for show in (
                f"{1e3 * row[name]['seconds_a_step']:.1f}",
                f"{row[name]['hours']:.2f}",
                f"{row[name]['usd']:.2f}",
            )
        ]
        for row in result["projection"]
    ]
    return "\n\n".join(
        [
            f"A training step of {EFFECTIVE_BATCH_SIZE} samples: on average {text['tokens_a_step']:.0f} tokens, padded "
            f"{text['padded_tokens_a_step']:.0f}, masked {text['masked_tokens_a_step']:.0f}.",
            table(["rung", "ms", "samples/s", "x", "x, over rounds", "statistics", "peak MB"], rungs),
            f"Floor of our softmax1 step here: {bottom['flops_a_step'] / 1e9:,.0f} GFLOP at "
            f"{bottom['measured_flops_per_second'] / 1e9:,.0f} GFLOP/s and {bottom['bytes_a_step'] / 1e9:.1f} GB at "
            f"{bottom['measured_bytes_per_second'] / 1e9:.1f} GB/s, both measured, are {1e3 * bottom['seconds']:,.1f} "
            f"ms; the step takes {bottom['times_the_floor']:.2f} times that.",
            table(["memory, float32", "tokens", "parameters MB", "activations MB", "together GB"], needs),
            f"Projected, not measured, for {STEPS:,} steps. Roofline: every FLOP and byte at the data sheet's rate. "
            f"Assumed: {REACHED_FLOPS:.0%} of those FLOP/s, {REACHED_BANDWIDTH:.0%} of the bandwidth and "
            f"{1e3 * LAUNCH_SECONDS:.0f} ms a step that nothing hides.",
            table(
                ["device", "tokens/sample", "roofline ms", "hours", "USD", "assumed ms", "hours", "USD"],
                projected,
            ),
        ]
    )


def attention_tables(result: dict) -> str:
    rows = [
        [
            row["part"],
            f"{row['length']:,}",
            str(row["batch"]),
            row["way"],
            f"{1e3 * row['median_seconds']:,.2f}",
            f"{row['of_stock']:.2f}",
            f"{row['lowest']:.2f} – {row['highest']:.2f}",
            f"{row['error']:.1e}",
            megabytes(row["peak_bytes"]),
        ]
        for row in sorted(result["attention"], key=lambda row: (row["part"], row["length"]))
    ]
    header = ["part", "tokens", "batch", "way", "ms", "x stock's time", "over rounds", "error", "peak MB"]
    about = (
        f"{HEADS} heads of {HEAD_SIZE}, {result['dtype']}. Error: of the output, and of the query's gradient, against "
        "the definition in float64, as a share of the largest entry."
    )
    return f"{about}\n\n{table(header, rows)}"


def tokenize_tables(result: dict) -> str:
    return (
        f"{result['lines']:,} lines in {result['seconds']:.0f} s: {result['lines_per_second']:,.0f} lines a second, "
        f"{result['file_bytes'] / 1e9:.2f} GB on disk; resident at most {result['peak_bytes'] / 1e9:.2f} GB "
        f"({result['start_bytes'] / 1e9:.2f} GB before the first line). Reading a batch of {EFFECTIVE_BATCH_SIZE} "
        f"at random takes {1e3 * result['seconds_to_read_a_batch']:.2f} ms."
    )


def step_plot(result: dict, figure) -> None:
    axes = figure.subplots()
    rows = result["rungs"][::-1]
    speeds = [row["samples_per_second"] for row in rows]
    bars = axes.barh([row["rung"] for row in rows], speeds, color="#0B3C7D")
    axes.bar_label(bars, [f" {speed:,.1f}  ({row['times']:.2f}x)" for speed, row in zip(speeds, rows, strict=True)])
    axes.margins(x=0.25)
    axes.set_xlabel("training samples a second")
    axes.set_title("From the published configuration to ours", loc="left")


def attention_plot(result: dict, figure) -> None:
    colours = ("#0B3C7D", "#E8850C", "#1B7F5C", "#C06FA5", "#56B4E9", "#8C2D04", "#7A7A7A", "#6A51A3", "#B8A500")
    looks = [*zip(colours, "os^Dv<>pX", strict=True)] * 2
    panels = figure.subplots(1, 2, sharey=True)
    ways = dict.fromkeys(row["way"] for row in result["attention"])
    for axes, part in zip(panels, ("forward", "forward+backward"), strict=True):
        for way, (colour, marker) in zip(ways, looks, strict=False):
            rows = [row for row in result["attention"] if (row["way"], row["part"]) == (way, part)]
            axes.plot(
                [row["length"] for row in rows],
                [row["of_stock"] for row in rows],
                color=colour,
                marker=marker,
                label=way,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="tokens", title=part)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time / time of PyTorch's softmax attention")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


BENCHMARKS = {
    "step": (benchmark_step, step_tables, step_plot),
    "attention": (benchmark_attention, attention_tables, attention_plot),
    "tokenize": (benchmark_tokenize, tokenize_tables, None),
}


# ----------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = command.Parser(description=__doc__)
    parser.add_argument("what", choices=list(BENCHMARKS), help="what to measure")
    parser.add_argument("--data_dir", default="data", help="dataset of build_dataset.py (%(default)s)")
    parser.add_argument("--tokenizer_dir", default="tokenizer", help="tokenizer of train_tokenizer.py (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark"), help="where results go (%(default)s)")
    parser.add_argument("--rounds", type=command.positive, default=50 if cuda else 5, help="repetitions (%(default)s)")
    parser.add_argument(
        "--max_length",
        type=command.positive,
        default=8192 if cuda else 2048,
        help="attention: longest sequence (%(default)s)",
    )
    parser.add_argument("--lines", type=command.positive, default=4_600_000, help="tokenize: lines (%(default)s)")
    args = parser.parse_args(argv)
    if args.what == "attention" and args.max_length < LENGTHS[0]:
        parser.error(f"--max_length must be at least {LENGTHS[0]}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unwritable(args.output_dir)
    measure, tables, plot = BENCHMARKS[args.what]
    hardware = record.hardware(device)
    result = {
        "argv": record.command_line() if argv is None else ["benchmark.py", *argv],
        "git": record.git_state(),
        "versions": record.versions(),
        "hardware": hardware,
        "rounds": args.rounds,
        **measure(args, device),
    }
    record.write_json(args.output_dir / f"{args.what}.json", result)
    where = (
        f"{hardware['name']}, {'threads' if device.type == 'cpu' else 'count'}: {hardware['count']}, "
        f"torch {result['versions']['torch']}, {args.rounds} rounds"
    )
    print(f"{where}\n\n{tables(result)}")
    if plot is not None:
        figure = plt.figure(figsize=(9, 4.5), layout="constrained")
        plot(result, figure)
        figure.suptitle(textwrap.fill(where, 110), fontsize=8)
        figure.savefig(args.output_dir / f"{args.what}.png", dpi=150)
    print(f"\nWritten to {args.output_dir}: {args.what}.json" + (f", {args.what}.png" if plot else ""))


if __name__ == "__main__":
    command.run(main)
