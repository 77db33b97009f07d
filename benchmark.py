"""How fast it is: our training step, attention and tokenizing beside stock ones, in one process.

    python benchmark.py step            a ladder from the published configuration to ours, one technique a rung
    python benchmark.py attention       softmax_n attention beside softmax attention and other ways to softmax_n
    python benchmark.py tokenize        lines a second and peak memory

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py); `attention` needs neither. Prints tables and writes
benchmark/<what>.json with every single time, and a plot beside it, both with the hardware on them. `attention` writes
the file after every length, so that an interrupted run leaves what it has measured.

A step of ours is that of train_model.py's own Trainer. In every round all that is compared runs on the same input, one
after the other, so that a noisy machine slows all of it alike. The ratio of two training steps is that of their times
summed over the rounds, because the batches of the rounds differ; the ratio of two attentions is the median of the
rounds' ratios. The extremes over the rounds follow it.
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
from collections.abc import Callable, Iterator
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
from torch.utils.benchmark import timer  # it waits for the GPU
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

import record
import train_model
from corpus import load_data, load_tokenizer, tokenized
from experiment import EFFECTIVE_BATCH_SIZE, MAX_LENGTH, MLM_PROBABILITY, SEED, STEPS, VOCAB_SIZE, build_model
from folder import refuse_unwritable
from held_out import evenly_spread
from kurtosis import ActivationKurtosis
from packing import IGNORED, on_device
from softmax1 import attention_backend, softmax_n_attention
from tables import table
from train_model import Inputs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SOFTMAX1 = "softmax1 for softmax"  # the rung whose floor and memory are told
LARGE_BATCH = 128  # what the published run asked for, and had no memory for

HEADS, HEAD_SIZE = 12, 64  # of the published model


# ------------------------------------------------------------------------------------------------------------ the step


class PublishedStep:
    """A training step of the published configuration, made of stock parts: padded, float32, logits of all tokens.

    Args:
        attention: transformers' attn_implementation, "eager" as published or "sdpa".
        fused: fused AdamW, and the loss is not read. Otherwise, as published, the loss is compared with NaN at every
            step, for which the CPU waits until the device is done.
    """

    statistics_steps = 1  # the activations' kurtosis is measured at every step

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, attention: str, fused: bool):
        self.model = build_model(0, VOCAB_SIZE, tokenizer, seed=SEED).to(device).train()
        self.model.set_attn_implementation(attention)
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
        self.fused = fused
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, weight_decay=0, fused=fused)
        self.statistics = ActivationKurtosis(self.model)

    def __call__(self, samples: list[dict], measure: bool) -> Tensor:
        batch = on_device(dict(self.collator([dict(sample) for sample in samples])), self.model.device)
        with self.statistics if measure else contextlib.nullcontext():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.fused:
            torch.isnan(loss).item()
        return loss.detach()


class OurStep:
    """The training step of train_model.py: what its Trainer does with a batch when train_model.py is given `flags`.

    Only the lines of `__call__` repeat what stands elsewhere: in the loop of transformers' Trainer, whose schedule,
    callbacks and log are left out. A batch is made in the same process, not by workers.

    Args:
        inputs: of `step_inputs`.
        output_dir: of the Trainer, which writes nothing there.
        flags: of train_model.py.
        all_positions: compute the logits of all positions, not of the masked ones only.
    """

    def __init__(self, inputs: Inputs, output_dir: str, *flags: str, all_positions: bool = False):
        flags = ("--output_dir", output_dir, "--vocab_size", str(VOCAB_SIZE), *flags)
        with torch.backends.flags():  # transformers switches to TF32 for --torch_compile, the float32 steps too
            experiment, args = train_model.parse([*flags])
        model, _ = train_model.model_of(experiment, args, inputs.tokenizer)
        self.trainer = train_model.trainer_of(experiment, args, inputs, model)
        self.trainer.current_gradient_accumulation_steps = 1
        self.statistics_steps = experiment.statistics_steps
        self.all_positions = all_positions
        # All Trainers of a process share one record of the precision, that of the latest one. It is read here alone.
        self.model, _ = self.trainer._prepare_for_training(STEPS, None, resume_from_checkpoint=None)

    def __call__(self, samples: list[dict], measure: bool) -> Tensor:
        self.trainer.state.global_step = 0 if measure else 1  # the statistics are measured at every so many steps
        batch = self.trainer.data_collator(samples)
        if self.all_positions:
            batch = with_all_positions(batch)
        loss = self.trainer.training_step(self.model, batch)
        self.trainer._clip_grad_norm(self.model)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        return loss


def with_all_positions(batch: dict) -> dict:
    """The packed batch, with the logits of all its positions asked for."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[0, batch["masked_positions"]] = batch["labels"][0]
    return {**batch, "masked_positions": torch.arange(labels.shape[1]), "labels": labels}


def ladder(inputs: Inputs, output_dir: str, device: torch.device) -> dict[str, PublishedStep | OurStep]:
    """From the published configuration to ours, one technique a rung.

    A step takes samples, and whether to measure their activations, and returns the loss.
    """
    published = partial(PublishedStep, inputs.tokenizer, device)
    ours = partial(OurStep, inputs, output_dir, "--use_cpu", str(device.type == "cpu"))
    every_step = ("--statistics_steps", "1")
    rungs: dict[str, PublishedStep | OurStep] = {
        "published: padded, eager attention": published("eager", fused=False),
        "+ fused AdamW, no waiting": published("eager", fused=True),
        "+ SDPA attention": published("sdpa", fused=True),
        "+ packed, no padding": ours(*every_step, all_positions=True),
        "+ head at masked positions": ours(*every_step),
        "+ statistics every 10th step": ours(),
        SOFTMAX1: ours("--use_softmax1"),
    }
    # A CPU without these instructions computes bfloat16 by way of float32, slower than float32 itself.
    if device.type == "cuda" or {"amx_bf16", "avx512_bf16"} & set(record.hardware(device).get("instructions", [])):
        rungs["+ bfloat16"] = ours("--use_softmax1", "--bf16")
    if device.type == "cuda":
        compiled = ("--torch_compile", "--torch_compile_mode", "reduce-overhead")
        rungs["+ compiled, CUDA graphs"] = ours("--use_softmax1", "--bf16", *compiled)
    return rungs


def timed(call: Callable[[], object]) -> float:
    """Seconds until `call` is done, on the GPU too."""
    start = timer()
    call()
    return timer() - start


def peak(call: Callable[[], object]) -> int | None:
    """Largest number of bytes that `call` allocates on the GPU; None on a CPU, whose allocations are not tracked."""
    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def benchmark_step(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    if torch.cuda.device_count() > 1:  # a Trainer would divide every batch among them
        sys.exit("error: several GPUs are visible, but a step takes one: set CUDA_VISIBLE_DEVICES=0")
    with tempfile.TemporaryDirectory(dir=args.output_dir) as scratch:
        inputs = step_inputs(args, scratch)
        rungs = ladder(inputs, scratch, device)
        samples = [{"input_ids": ids} for ids in inputs.train["input_ids"]]
        first, *batches = (samples[i : i + EFFECTIVE_BATCH_SIZE] for i in range(0, len(samples), EFFECTIVE_BATCH_SIZE))
        # The graph of a shape is compiled at its first step, perhaps again when others have been seen, and recorded at
        # the step after that. From the fourth step on, all that is timed is the step.
        warm_up = [first, *batches] * 4 if device.type == "cuda" else [first]
        bytes_taken, measured, plain = {}, {}, {}  # seconds of the rounds, with and without statistics
        for label, step in tqdm(rungs.items(), desc="warm-up", unit="rung"):  # compiling takes minutes
            for batch in warm_up:
                step(batch, False)
            bytes_taken[label] = peak(partial(step, first, True))
            measured[label], plain[label] = [], []
        for batch in tqdm(batches, desc="rounds"):
            for label, step in rungs.items():
                measured[label].append(timed(partial(step, batch, True)))
                if step.statistics_steps > 1:
                    plain[label].append(timed(partial(step, batch, False)))
        rows = []
        for label, step in rungs.items():
            seconds, overhead = np.array(measured[label]), None
            if step.statistics_steps > 1:  # one step in so many is measured
                extra = (seconds - plain[label]) / step.statistics_steps
                seconds, overhead = plain[label] + extra, float(extra.sum() / sum(plain[label]))
            published = seconds if not rows else np.array(rows[0]["seconds"])
            rows.append(
                {
                    "rung": label,
                    "median_seconds": float(np.median(seconds)),
                    # How many times faster: the ratio of the sums over the rounds, and the extremes of a round.
                    "times": float(published.sum() / seconds.sum()),
                    "lowest": float((published / seconds).min()),
                    "highest": float((published / seconds).max()),
                    "samples_per_second": float(EFFECTIVE_BATCH_SIZE * len(batches) / seconds.sum()),
                    "statistics_share": overhead,
                    "peak_bytes": bytes_taken[label],
                    "seconds": seconds.tolist(),
                }
            )
        ours: OurStep = rungs[SOFTMAX1]
        seconds = next(row["median_seconds"] for row in rows if row["rung"] == SOFTMAX1)
        yield {
            "text": lengths_of(ours, batches),
            "rungs": rows,
            "floor": floor(ours, batches, seconds, device),
            "memory": memory(ours, samples[EFFECTIVE_BATCH_SIZE:]),
        }


def step_inputs(args: argparse.Namespace, scratch: str) -> Inputs:
    """A batch more than rounds, of samples drawn from the training text as they come, tokenized into `scratch`."""
    data, manifest = load_data(args.data_dir)
    tokenizer = load_tokenizer(args.tokenizer_dir, VOCAB_SIZE)
    wanted = (args.rounds + 1) * EFFECTIVE_BATCH_SIZE
    if len(data["train"]) < wanted:
        sys.exit(f"error: {args.rounds} rounds take {wanted} samples, {args.data_dir} has fewer: give fewer --rounds")
    data["train"] = data["train"].select(np.random.default_rng(0).permutation(len(data["train"]))[:wanted])
    data["validation"] = data["validation"].select([0])  # a Trainer needs one, but no step looks at it
    data = tokenized(data, Path(scratch) / "tokenized", tokenizer, MAX_LENGTH)
    return Inputs(data["train"], data["validation"], [], tokenizer, "", manifest)


def lengths_of(step: OurStep, batches: list[list[dict]]) -> dict[str, float]:
    """How many tokens a step has on average: real ones, with padding, and masked."""
    packed = [step.trainer.data_collator(batch) for batch in batches]
    padded = [len(batch) * max(len(sample["input_ids"]) for sample in batch) for batch in batches]
    return {
        "tokens_a_step": float(np.mean([batch["tokens"] for batch in packed])),
        "padded_tokens_a_step": float(np.mean(padded)),
        "masked_tokens_a_step": float(np.mean([batch["masked_tokens"].item() for batch in packed])),
    }


# ----------------------------------------------------------------------------------------------- floor and memory


def floor(step: OurStep, batches: list[list[dict]], ours: float, device: torch.device) -> dict:
    """The least time that our softmax1 step could take here, from rates measured here, and the time it takes.

    Args:
        batches: those of the rounds.
        ours: median seconds of the step.
    """
    # By the plain formula, because PyTorch counts nothing in its CPU kernel. With it padding is counted on a GPU too.
    with attention_backend("eager"), FlopCounterMode(display=False) as counter:
        for batch in batches:
            step(batch, False)
    flops = counter.get_total_flops() / len(batches)
    # The float32 parameters are read forward and backward; their gradient is written, read for its norm, and read and
    # written by the clipping; AdamW reads four tensors and writes three. Activations are small at this batch and stay
    # in the cache.
    moved = 4 * sum(parameter.numel() for parameter in step.model.parameters()) * (2 + 1 + 1 + 2 + 7)
    a, b = torch.randn(1024, 3072, device=device), torch.randn(3072, 3072, device=device)
    big = torch.ones(1 << 27, device=device)  # 512 MiB, beyond every cache
    matmul = min(timed(lambda: a @ b) for _ in range(5))
    copying = min(timed(lambda: big[: 1 << 26].copy_(big[1 << 26 :])) for _ in range(5))
    rate, bandwidth = 2 * 1024 * 3072**2 / matmul, 2 * (1 << 28) / copying
    seconds = flops / rate + moved / bandwidth
    return {
        "flops_a_step": flops,
        "bytes_a_step": moved,
        "measured_flops_per_second": rate,
        "measured_bytes_per_second": bandwidth,
        "seconds": seconds,
        "ours_seconds": ours,
        "times_the_floor": ours / seconds,
    }


def memory(step: OurStep, samples: list[dict]) -> list[dict]:
    """Bytes that our float32 step needs at the published batch, and at the batch for which the published run was too
    large: weights, gradients and AdamW's two moments, and what the forward pass keeps for the backward pass.
    """
    longest = {"input_ids": [0, *[5 + i % 1000 for i in range(MAX_LENGTH - 2)], 2]}
    as_they_come = (samples * LARGE_BATCH)[:LARGE_BATCH]
    return [
        {
            "batch": len(batch),
            "of": label,
            "tokens": sum(len(sample["input_ids"]) for sample in batch),
            "parameter_bytes": 4 * 4 * sum(parameter.numel() for parameter in step.model.parameters()),
            "activation_bytes": activation_bytes(step, batch),
        }
        for label, batch in (
            ("samples as they come", as_they_come[:EFFECTIVE_BATCH_SIZE]),
            ("samples as they come", as_they_come),
            (f"{MAX_LENGTH} tokens each", [longest] * EFFECTIVE_BATCH_SIZE),
        )
    ]


def activation_bytes(step: OurStep, samples: list[dict]) -> int:
    """Bytes of all that autograd keeps but the parameters; counted, so that a CPU has the figure too."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = on_device(step.trainer.data_collator(samples), step.trainer.args.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.trainer.compute_loss(step.model, batch)
    for parameter in step.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


# ------------------------------------------------------------------------------------------------------------ attention


LENGTHS = (20, 36, *(64 << power for power in range(8)))  # 20 and 36 tokens: sentences
PATIENCE = 120  # seconds: an implementation that takes longer at one length is left out of the longer ones
REFERENCE_ROWS = 64  # queries, evenly spread, whose output is compared with the definition in float64


def peers() -> dict[str, Callable]:
    """Other implementations of the same two functions: transformers', and those of packages that are installed here.

    Their arguments are those of `contestants`. They may still refuse this device.
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

    installed = {"sinks, transformers' eager": transformers_eager, "sinks, flex attention": transformers_flex}
    for package, name, attend in (
        ("flash_attention_softmax_n", "softmax1, flash-attention-softmax-n", flash_attention_softmax_n),
        ("flash_attn", "sinks, FlashAttention", flash_attention),
        ("transformer_engine", "softmax1, TransformerEngine", transformer_engine),
    ):
        if importlib.util.find_spec(package):
            installed[name] = attend
    return installed


def contestants() -> dict[str, Callable]:
    """Implementations of attention, as functions of query, key, value (batch, heads, tokens, size) and sinks (heads,).

    The first word of a name says what is computed: softmax, softmax1, or softmax_n with log n = sinks. The first one
    is PyTorch's softmax attention.
    """

    def ours(backend: str, learned: bool) -> Callable:
        def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
            with attention_backend(backend):
                return softmax_n_attention(query, key, value, **({"log_n": sinks} if learned else {}))

        return attend

    # On a GPU from Hopper on, "auto" computes n = 1 by the zero key; every other n takes the flash kernel.
    flash = {"softmax1, flash kernel": ours("flash", False)} if torch.cuda.is_available() else {}
    return {
        "softmax (PyTorch)": lambda query, key, value, sinks: F.scaled_dot_product_attention(query, key, value),
        "softmax1 (ours)": ours("auto", False),
        **flash,
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


def relative_error(computed: Tensor, exact: Tensor) -> float:
    """Largest difference in the rows of `exact_rows`, as a share of the largest entry."""
    rows = evenly_spread(computed.shape[2], REFERENCE_ROWS)
    return ((computed[:1, :, rows].double() - exact).abs().max() / exact.abs().max()).item()


def attention_times(
    ways: dict[str, Callable], length: int, batch: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> list[dict]:
    """A row for each implementation that runs, and part (forward, forward and backward): times, error, memory.

    The errors are `relative_error` of the output and of the query's gradient. Implementations that fail are reported
    and skipped; those that take more than PATIENCE seconds are taken out of `ways`.
    """
    # Compiled attention (flex) is compiled for this length only: from its ninth shape on PyTorch would not compile it.
    torch.compiler.reset()
    shape = (batch, HEADS, length, HEAD_SIZE)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    sinks = torch.linspace(-2, 4, HEADS, device=device).requires_grad_()
    upstream = torch.randn(shape, device=device, dtype=dtype)
    inputs = (query, key, value, sinks)
    exact = {kind: exact_rows(kind, *inputs, upstream) for kind in ("softmax", "softmax1", "sinks")}

    @torch.no_grad()
    def forward(name: str) -> Tensor:
        return ways[name](*inputs)

    def both(name: str) -> Tensor:
        leaves = inputs if function_of(name) == "sinks" else inputs[:3]
        return torch.autograd.grad(ways[name](*inputs), leaves, upstream)[0]

    parts = {"forward": forward, "forward+backward": both}
    bytes_taken, errors, seconds = {}, {}, {}
    stock, *_ = ways
    for name in list(ways):  # and the warm-up
        start = time.perf_counter()
        try:
            for (part, run), reference in zip(parts.items(), exact[function_of(name)], strict=True):
                errors[name, part] = relative_error(run(name), reference)
            bytes_taken[name] = peak(partial(both, name))
            seconds |= {(name, part): [] for part in parts}
        except Exception as error:  # no memory, or an unsupported dtype or device: other packages raise anything
            tqdm.write(f"{name} at {length} tokens: {record.one_line(error)}", file=sys.stderr)
        if time.perf_counter() - start > PATIENCE and name != stock:
            tqdm.write(
                f"{name} took over {PATIENCE} s at {length} tokens and is left out from here on", file=sys.stderr
            )
            seconds = {key: times for key, times in seconds.items() if key[0] != name}
            del ways[name]
    for _ in range(rounds):
        for name, part in seconds:
            seconds[name, part].append(timed(partial(parts[part], name)))
    return [
        {
            "length": length,
            "batch": batch,
            "way": name,
            "part": part,
            "median_seconds": float(np.median(times)),
            **of_stock(times, seconds[stock, part]),
            "error": errors[name, part],
            "peak_bytes": bytes_taken[name],
            "seconds": times,
        }
        for (name, part), times in seconds.items()
    ]


def of_stock(seconds: list[float], stock: list[float]) -> dict[str, float]:
    """Time as a multiple of stock's: the median of the rounds' ratios, and their extremes."""
    ratios = np.array(seconds) / np.array(stock)
    return {"of_stock": float(np.median(ratios)), "lowest": float(ratios.min()), "highest": float(ratios.max())}


def benchmark_attention(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """What has been measured so far, after every length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ways, rows = contestants(), []
    lengths = [length for length in LENGTHS if length <= args.max_length]
    about = {"dtype": str(dtype).removeprefix("torch."), "heads": HEADS, "head_size": HEAD_SIZE, "lengths": lengths}
    for length in tqdm(lengths, desc="lengths"):
        batch = max(1, min(16, args.max_length // length))  # as many tokens at every length, but no more than 16 rows
        rows += attention_times(ways, length, batch, args.rounds, dtype, device)
        yield {**about, "attention": rows}


# ----------------------------------------------------------------------------------------------------------- tokenizing


def benchmark_tokenize(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
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
        splits = tokenized(datasets.DatasetDict(train=text), Path(scratch) / "tokenized", tokenizer, MAX_LENGTH)
        seconds = time.perf_counter() - start
        result = splits["train"]
        drawn = np.random.default_rng(0).permutation(len(result))[: 1000 * EFFECTIVE_BATCH_SIZE]
        order = np.array_split(drawn, math.ceil(len(drawn) / EFFECTIVE_BATCH_SIZE))
        reading = timed(lambda: [result[batch] for batch in order])
        written = sum(path.stat().st_size for path in Path(scratch).rglob("*.arrow"))
    yield {
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
    panels = figure.subplots(1, 2, sharey=True)
    ways = dict.fromkeys(row["way"] for row in result["attention"])
    for axes, part in zip(panels, ("forward", "forward+backward"), strict=True):
        axes.set_prop_cycle(color=colours, marker=list("os^Dv<>pX"))
        for way in ways:
            rows = [row for row in result["attention"] if (row["way"], row["part"]) == (way, part)]
            axes.loglog([row["length"] for row in rows], [row["of_stock"] for row in rows], base=2, label=way)
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
    about = {
        "argv": record.command_line() if argv is None else ["benchmark.py", *argv],
        "git": record.git_state(),
        "versions": record.versions(),
        "hardware": hardware,
        "rounds": args.rounds,
    }
    for so_far in measure(args, device):
        result = {**about, **so_far}
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
