"""benchmark.py: what it counts, what it compares, and that each of its commands goes through."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import experiment
from corpus import load_tokenizer
from packing import MaskedLMCollator, summed_loss

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}


@pytest.fixture
def run(sample, tmp_path, monkeypatch):
    """run("step", "--flag", ...) measures a small model below tmp_path and returns what was written."""
    monkeypatch.setattr(experiment, "ARCHITECTURE", SMALL)
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 1024)
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
    assert Path("benchmark/step.png").stat().st_size > 10_000
    assert "softmax1 for softmax" in capsys.readouterr().out


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


def test_counted_flops_are_torch_s(sample):
    """The full model's step: torch's own counter, which knows matrix products and attention kernels."""
    tokenizer = load_tokenizer(sample / "tokenizer", 52_032)
    model = experiment.accept_packed_batches(
        experiment.build_model(0, benchmark.VOCAB_SIZE, tokenizer, 0)
    ).eval()  # no dropout: a counted kernel
    samples = [{"input_ids": [0, *range(5, 5 + length), 2]} for length in (30, 6, 2)]
    batch = MaskedLMCollator(tokenizer, mlm_probability=0.5, seed=1, packed=True)(samples)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, batch)[0].backward()
    tokens = batch["tokens"]
    lengths = [len(sample["input_ids"]) for sample in samples]
    flops, _ = benchmark.step_work(tokens, batch["masked_tokens"].item(), sum(n * n for n in lengths) / tokens)
    # Attention's backward pass rebuilds the scores: 5 products where a pass over stored ones has 4.
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)


def test_bad_input_ends_in_one_line(run, capsys):
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
