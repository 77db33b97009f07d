"""benchmark.py: what it counts, what it compares, and that each of its commands goes through."""

import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURE

import benchmark
import experiment


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setattr(experiment, "ARCHITECTURE", ARCHITECTURE)
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 1024)


@pytest.fixture
def run(sample, tmp_path, monkeypatch, small_model):
    """run("step", "--flag", ...) measures a small model below tmp_path and returns what was written."""
    monkeypatch.chdir(tmp_path)
    places = ["--data_dir", str(sample / "data"), "--tokenizer_dir", str(sample / "tokenizer")]

    def measure(what, *flags):
        benchmark.main([what, *places, *flags])
        return json.loads(Path(f"benchmark/{what}.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)

    return measure


def test_ladder(run, capsys):
    result = run("step", "--rounds", "2")
    rungs = result["rungs"]
    assert len(rungs) >= 7 and all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rungs)
    assert rungs[0]["times"] == rungs[0]["lowest"] == rungs[0]["highest"] == 1
    for row in rungs:
        assert row["times"] == pytest.approx(sum(rungs[0]["seconds"]) / sum(row["seconds"]))
        assert row["lowest"] <= row["times"] <= row["highest"]
        assert row["samples_per_second"] == pytest.approx(32 / sum(row["seconds"]))
    assert 0 < result["text"]["masked_tokens_a_step"] < result["text"]["tokens_a_step"]
    assert result["text"]["tokens_a_step"] < result["text"]["padded_tokens_a_step"]
    at_16, at_128, longest = result["memory"]
    assert (at_16["batch"], at_128["batch"], longest["tokens"]) == (16, 128, 16 * 512)
    assert at_16["activation_bytes"] < at_128["activation_bytes"] < longest["activation_bytes"]
    assert Path("benchmark/step.png").stat().st_size > 10_000
    assert "softmax1 for softmax" in capsys.readouterr().out


@pytest.fixture
def inputs(sample, tmp_path, small_model):
    places = {"data_dir": str(sample / "data"), "tokenizer_dir": str(sample / "tokenizer")}
    return benchmark.step_inputs(Namespace(**places, rounds=2), tmp_path)


def our_step(inputs, folder, *flags, **kwargs):
    """OurStep on this CPU without dropout, which differs with the random numbers before it."""
    no_dropout = "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
    return benchmark.OurStep(inputs, str(folder), "--use_cpu", "--config_overrides", no_dropout, *flags, **kwargs)


def test_our_step_is_that_of_the_training(inputs, tmp_path):
    """Given the same samples, it leaves bit for bit the weights that Trainer's own loop leaves."""
    flags = ("--use_softmax1", "--lr_scheduler_type", "constant", "--max_steps", "3", "--statistics_steps", "2")
    inputs = replace(inputs, watched=list(inputs.validation["input_ids"]))  # the training looks at them
    trained, step = (our_step(inputs, tmp_path, *flags) for _ in range(2))
    before = [parameter.clone() for parameter in step.model.parameters()]
    collate, seen = trained.trainer.data_collator, []
    trained.trainer.data_collator = lambda samples: seen.append(samples) or collate(samples)
    trained.trainer.train()
    for number, samples in enumerate(seen):
        step(samples, measure=number % 2 == 0)
    assert len(seen) == 3
    for old, expected, computed in zip(before, trained.model.parameters(), step.model.parameters(), strict=True):
        assert torch.equal(expected, computed) and not torch.equal(old, computed)
    assert step.trainer.statistics.state() == trained.trainer.statistics.state()


def test_rungs_keep_their_precision(inputs, tmp_path, monkeypatch):
    """All Trainers of a process share accelerate's state, which says bfloat16 when that rung has been made, and
    PyTorch's, which transformers sets to TF32 where a model is compiled for a GPU that has it."""
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    samples = inputs.train.to_list()[:16]
    unchanged = ("--learning_rate", "0")
    float32 = our_step(inputs, tmp_path, *unchanged)
    losses = [float32(samples, False).item()]
    bfloat16 = our_step(inputs, tmp_path, *unchanged, "--bf16")
    for _ in range(2):
        our_step(inputs, tmp_path, "--bf16", "--torch_compile")
        assert torch.backends.fp32_precision == "none"
    losses.append(float32(samples, False).item())
    assert losses[0] == losses[1] != bfloat16(samples, False).item()
    later = our_step(inputs, tmp_path, *unchanged)
    assert later(samples, False).item() == losses[0]
    assert bfloat16(samples, False).item() == pytest.approx(losses[0], rel=1e-3)
    whole_head = our_step(inputs, tmp_path, *unchanged, all_positions=True)
    assert whole_head(samples, False).item() == pytest.approx(losses[0], rel=1e-6)


def test_floor_counts_every_matrix_product(inputs, tmp_path):
    step = benchmark.OurStep(inputs, str(tmp_path), "--use_cpu", "--use_softmax1")
    samples = inputs.train.to_list()
    batches = [samples[:16], samples[16:32]]
    found = benchmark.floor(step, batches, ours=1.0, device=torch.device("cpu"))
    text = benchmark.lengths_of(step, batches)
    layers, hidden, inner = (ARCHITECTURE[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    encoder = text["tokens_a_step"] * layers * (4 * hidden**2 + 2 * hidden * inner)
    head = text["masked_tokens_a_step"] * (hidden**2 + hidden * 1024)
    pairs = sum(len(sample["input_ids"]) ** 2 for sample in samples[:32]) / 2
    # A weight is used once forward and twice backward, and so are the two products of attention for a pair of tokens.
    products = encoder + head + 2 * pairs * layers * hidden
    assert found["flops_a_step"] == 3 * 2 * products
    assert found["times_the_floor"] == pytest.approx(1 / found["seconds"])


def test_attention(run, capsys):
    result = run("attention", "--rounds", "2", "--max_length", "64")
    rows = result["attention"]
    assert {row["length"] for row in rows} == {20, 36, 64}
    assert {row["part"] for row in rows} == {"forward", "forward+backward"}
    assert all(row["of_stock"] == 1 for row in rows if row["way"] == "softmax (PyTorch)")
    ways = {"softmax1 (ours)", "softmax1, zero key", "softmax1, eager", "sinks (ours)", "sinks, zero key"}
    assert ways | {"sinks, transformers' eager"} <= {row["way"] for row in rows}
    assert all(0 < row["error"] < 1e-5 for row in rows)
    # Where the kernels of a GPU alone have what is asked, that is said, and the others are measured.
    assert "sinks, flex attention at 20 tokens: Attention sinks cannot be run on CPU" in capsys.readouterr().err
    assert Path("benchmark/attention.png").stat().st_size > 10_000


def test_what_was_measured_survives_an_interruption(run, monkeypatch):
    measure = benchmark.attention_times

    def interrupted(ways, length, *more):
        if length == 64:
            raise KeyboardInterrupt
        return measure({name: ways[name] for name in ("softmax (PyTorch)", "softmax1 (ours)")}, length, *more)

    monkeypatch.setattr(benchmark, "attention_times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("attention", "--rounds", "1", "--max_length", "64")
    written = json.loads(Path("benchmark/attention.json").read_text(encoding="utf-8"))
    assert written["lengths"] == [20, 36, 64] and {row["length"] for row in written["attention"]} == {20, 36}


def test_implementations_that_fail_or_take_long_do_not_hold_up_the_others(monkeypatch, capsys):
    def slow(*inputs):
        time.sleep(0.3)
        return stock(*inputs)

    def failing(*inputs):
        raise ValueError("not on this device")

    def stock(query, key, value, sinks):
        return F.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(benchmark, "PATIENCE", 0.5)
    ways = {"softmax (PyTorch)": stock, "softmax, slow": slow, "softmax, failing": failing}
    rows = benchmark.attention_times(ways, 8, 1, 1, torch.float32, torch.device("cpu"))
    assert {row["way"] for row in rows} == {"softmax (PyTorch)"} and "softmax, slow" not in ways
    said = capsys.readouterr().err
    assert "softmax, slow took over 0.5 s at 8 tokens and is left out from here on" in said
    assert "softmax, failing at 8 tokens: not on this device" in said


def test_a_compiled_implementation_is_compiled_for_every_length():
    """Without a reset PyTorch gives up after eight shapes and runs the function uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs)
        return graph.forward

    def stock(query, key, value, sinks):
        return F.scaled_dot_product_attention(query, key, value)

    ways = {"softmax (PyTorch)": stock, "softmax, compiled": torch.compile(stock, backend=backend, dynamic=False)}
    for length in range(4, 10):
        benchmark.attention_times(ways, length, 1, 1, torch.float32, torch.device("cpu"))
    assert len(compiled) == 2 * 6  # with and without gradients


def test_errors_are_of_the_function_that_a_way_computes():
    ways, inputs = benchmark.contestants(), [torch.randn(2, 12, 9, 64, requires_grad=True) for _ in range(3)]
    sinks, upstream = torch.linspace(-2, 4, 12).requires_grad_(), torch.randn(2, 12, 9, 64)
    kinds = ("softmax", "softmax1", "sinks")
    exact = {kind: benchmark.exact_rows(kind, *inputs, sinks, upstream) for kind in kinds}
    assert {benchmark.function_of(name) for name in ways} == set(kinds)
    for name, way in ways.items():
        if "flex" in name:  # on a GPU alone
            continue
        output = way(*inputs, sinks)
        gradient = torch.autograd.grad(output, inputs[0], upstream)[0]
        for kind in kinds:
            errors = [benchmark.relative_error(*pair) for pair in zip((output, gradient), exact[kind], strict=True)]
            assert (max(errors) < 1e-5) == (kind == benchmark.function_of(name)), (name, kind)


def test_tokenize(run, sample):
    result = run("tokenize", "--lines", "1300")
    assert result["lines"] == 1300 and result["lines_per_second"] > 0
    assert result["peak_bytes"] >= result["start_bytes"] > 0 and result["file_bytes"] > 1300 * 8
    assert [path.name for path in Path("benchmark").iterdir()] == ["tokenize.json"]


def test_bad_input_ends_in_one_line(run, monkeypatch):
    for flags, text in (
        (["step", "--data_dir", "nowhere"], "run build_dataset.py first"),
        (["step", "--rounds", "999"], "give fewer --rounds"),
        (["tokenize", "--tokenizer_dir", "nowhere"], "run train_tokenizer.py first"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*flags)
        assert text in str(caught.value) and "\n" not in str(caught.value)
    for flags in (["everything"], ["step", "--rounds", "0"], ["attention", "--max_length", "19"]):
        with pytest.raises(SystemExit) as caught:
            benchmark.main(flags)
        assert caught.value.code == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="set CUDA_VISIBLE_DEVICES=0"):
        run("step")
