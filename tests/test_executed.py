"""executed.py on small models: the exported function, known damage, equal figures for both classes, failures."""

import json
import math
import sys

import datasets
import numpy as np
import onnx
import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from test_class_swap import both_classes, differences
from test_quantization import SMALL, batches, known_text, learn, model_of

import analyze_kurtosis
import executed
from controls import build_control, compensated_outlier
from held_out import per_text_loss
from quantization import EXECUTED, bootstrap_difference, measure_damage
from run_tables import executed_section
from runs import Run

FORMATS = ("int8_minmax", "int8_percentile")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few repetitions, because the tests do not check how long a call takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executed, "REPETITIONS", 3)
        yield


@pytest.fixture(scope="module")
def learnt():
    return learn(model_of("softmax1"))


def damage_of(model):
    draws, published = known_text()
    return measure_damage(model, batches(5, seed=2), draws, published)


def execute(model, damage):
    return executed.execute(model, batches(5, seed=2), known_text()[0][0], damage)


@pytest.fixture(scope="module")
def plain(learnt):
    damage = damage_of(learnt)
    return damage | {"executed": execute(learnt, damage)}


@pytest.fixture(scope="module")
def quantized(learnt, tmp_path_factory):
    """Folder with prepared.onnx and a quantized graph of each scheme, and the groups they were calibrated on."""
    folder, groups = tmp_path_factory.mktemp("quantized"), executed.groups_of(known_text()[0][0])
    executed.export(learnt, folder / "model.onnx")
    executed.quant_pre_process(folder / "model.onnx", folder / "prepared.onnx")
    for scheme in FORMATS:
        executed.quantize(folder / "prepared.onnx", folder / f"{scheme}.onnx", scheme, groups)
    return folder, groups


def graph_of(path):
    """(graph, {name of a parameter: its values})"""
    graph = onnx.load(path).graph
    return graph, {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in graph.initializer}


def test_texts_are_run_unpadded_in_groups_of_equal_length():
    padded = batches(3, seed=2)
    groups = executed.groups_of(padded)
    assert [group.input_ids.shape for group in groups] == [(3, 6), (21, 12)]
    assert sorted(number for group in groups for number in group.texts) == list(range(24))
    assert groups[0].texts == [0, 8, 16]  # the short text of every batch
    for group in groups:
        flat = group.input_ids.reshape(-1)
        assert 1 not in flat and (flat[group.positions] == 4).all()  # no padding; predicted tokens are masked
        for number, row in zip(group.texts, range(len(group.texts)), strict=True):
            batch = padded[number // 8]
            labels = batch["labels"][number % 8]
            assert group.labels[group.row == row].tolist() == labels[labels != -100].tolist()


def test_long_texts_run_in_smaller_groups(monkeypatch):
    monkeypatch.setattr(executed, "TOKENS", 30)
    assert {len(group.texts) for group in executed.groups_of(batches(3, seed=2))} == {3, 2, 1}


# An export takes seconds. Other tests below export softmax1 too.
SLOW = ("softmax1", "learned", "bert", "gated")
KINDS = ["softmax0", "clipped", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_is_the_model(kind, tmp_path):
    """The losses of all texts equal those that PyTorch computes with the model's own attention."""
    torch.manual_seed(0)
    model = build_control(kind, SMALL) if kind in ("clipped", "gated") else model_of(kind)
    model.eval()
    executed.export(model, tmp_path / "model.onnx")
    texts = batches(3, seed=2)
    losses = executed.text_losses(executed.session_of(tmp_path / "model.onnx", 1), executed.groups_of(texts))
    expected = per_text_loss(model, texts)[:, 0].numpy()
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_executed_figures_agree_with_simulated_figures(plain):
    results = plain["executed"]
    assert results["schemes"].keys() == results["texts"].keys() == EXECUTED.keys()
    assert results["masked"] == plain["masked"] and results["masked_tokens"] == plain["masked_tokens"]
    assert abs(results["float32_change"]) < 1e-5
    simulated = plain["schemes"]
    assert results["schemes"]["float32"]["loss"] == pytest.approx(simulated["float32"]["loss"], abs=1e-5)
    for scheme, simulated_scheme in executed.SIMULATED.items():
        figures, agreement = results["schemes"][scheme], results["agreement"][scheme]
        assert simulated[simulated_scheme].keys() - {"draws"} == figures.keys() - {"bytes"}
        sums = np.array(results["texts"][scheme]) - np.array(results["texts"]["float32"])
        assert figures["gap"] == pytest.approx(sums.sum() / results["masked_tokens"], abs=1e-5)
        assert agreement["difference"] == pytest.approx(figures["gap"] - simulated[simulated_scheme]["gap"], abs=1e-5)
        assert abs(agreement["arithmetic"]) < 0.01 and 1e-5 < abs(figures["gap"]) < 0.1
        assert -1 <= agreement["correlation"] <= 1
    low, high = bootstrap_difference(results, results, "int8_minmax")
    assert low == high == 0


def test_sizes_latency_and_operators(plain):
    results = plain["executed"]
    sizes = {name: figures["bytes"] for name, figures in results["schemes"].items()}
    assert 0 < sizes["int8_minmax"] < sizes["float32"]
    assert results["latency"]["tokens"] == 38 and results["latency"]["formats"].keys() == EXECUTED.keys()
    for figures in results["latency"]["formats"].values():
        assert 0 < figures["q25"] <= figures["median"] <= figures["q75"]
    assert results["latency"]["formats"]["float32"]["speedup"] == 1
    operators, layers = results["operators"], SMALL["num_hidden_layers"]
    linear = 6 * layers + 2
    assert operators["qdq"]["8 bits in and out"]["Gemm"] == linear - 1  # all but the Gemm of the logits
    assert operators["qdq"]["float32"] == {"Gemm": 1}
    assert operators["kernels"]["int8"]["QGemm"] == linear
    assert operators["kernels"]["int8"]["QLinearMatMul"] == 2 * layers
    norms = 2 * layers + 2
    assert operators["kernels"]["float32"] == {"Gelu": layers + 1, "LayerNormalization": norms, "Softmax": layers}
    assert operators["biases"] == linear + norms
    # Weights of every Gemm but the tied decoder, of every LayerNorm and three embeddings; and the scale of the scores.
    assert operators["weights"] == linear - 1 + norms + 3 + 1
    assert operators["simulated_activations"] == len(plain["ranges"])


def test_the_logits_and_the_softmax_are_not_rounded(quantized):
    folder, groups = quantized
    session = executed.session_of(folder / "int8_minmax.onnx", 1)
    assert len(np.unique(session.run(None, groups[-1].feed)[0])) > 1000
    graph, _ = graph_of(folder / "int8_minmax.onnx")
    producer = {name: node for node in graph.node for name in node.output}
    softmaxes = 0
    for node in graph.node:
        if node.op_type == "Softmax":
            pad = producer[node.input[0]]  # adds the null logit, which depends on n and must not be rounded
            assert pad.op_type == "Pad" and producer[pad.input[0]].op_type == "DequantizeLinear"
            softmaxes += 1
    assert softmaxes == SMALL["num_hidden_layers"]


def test_an_outlier_damages_the_executed_model_too(learnt, plain):
    """A positive control computes the same function, but the range of one tensor is a thousand times as large."""
    control = compensated_outlier(learnt, 1, 5, 1000.0)
    damage = damage_of(control)
    results = execute(control, damage)
    assert results["schemes"]["float32"]["loss"] == pytest.approx(plain["schemes"]["float32"]["loss"], abs=1e-3)
    assert results["schemes"]["int8_minmax"]["gap"] > 1 > 10 * plain["executed"]["schemes"]["int8_minmax"]["gap"]
    agreement = results["agreement"]["int8_minmax"]
    assert agreement["correlation"] > 0.5
    assert abs(agreement["difference"]) < 0.5 * damage["schemes"]["w8a8_static"]["gap"]


def test_calibrated_ranges_cover_the_calibration_texts(quantized):
    """The MinMax range of every rounded tensor is the range of its values on the calibration texts."""
    folder, groups = quantized
    graph, stored = graph_of(folder / "int8_minmax.onnx")
    model = onnx.load(folder / "prepared.onnx")
    made = {name for node in model.graph.node for name in node.output}
    rounded = {
        node.input[0]: (stored[node.input[1]].item(), stored[node.input[2]].item())  # one number for each tensor
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in made
    }
    assert len(rounded) > 50
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in rounded)
    onnx.save(model, folder / "all.onnx")
    session = executed.session_of(folder / "all.onnx", 1, optimized=False)
    seen = [session.run(list(rounded), group.feed) for group in groups]
    for (name, (scale, zero)), values in zip(rounded.items(), zip(*seen, strict=True), strict=True):
        low, high = min(0, *(array.min() for array in values)), max(0, *(array.max() for array in values))
        if name not in made_from_table(graph):  # rows of a table have the range of the whole table
            assert [low, high] == pytest.approx([-zero * scale, (255 - zero) * scale], abs=scale), name


def made_from_table(graph):
    """Names of the tensors that Gather reads from an embedding table."""
    return {node.output[0] for node in graph.node if node.op_type == "Gather"}


def test_the_group_with_most_tokens_is_calibrated_first(monkeypatch, tmp_path):
    """Histograms keep the bin width of the first group, which would be tiny if a head attended to nothing there."""
    seen = []
    monkeypatch.setattr(executed, "quantize_static", lambda path, output, reader, **_: seen.extend(reader.feeds))
    monkeypatch.setattr(executed, "behind_softmax", lambda model: [])
    monkeypatch.setattr(executed, "leave_logits", lambda path: None)
    monkeypatch.setattr(executed.onnx, "load", lambda path: None)
    groups = [group for group in executed.groups_of(known_text()[0][0]) if len(group.positions)]
    executed.quantize(tmp_path / "prepared.onnx", tmp_path / "out.onnx", "int8_percentile", groups)
    sizes = [feed["input_ids"].size for feed in seen]
    assert len(sizes) == len(groups) > 1 and sizes[0] == max(sizes) > sizes[-1]


def test_percentile_ranges_are_cut_at_both_ends(quantized):
    folder, _ = quantized
    scales = {}
    for scheme in FORMATS:
        graph, stored = graph_of(folder / f"{scheme}.onnx")
        made = {name: node.op_type for node in graph.node for name in node.output}
        scales[scheme] = {
            node.input[1]: float(stored[node.input[1]])
            for node in graph.node
            if node.op_type == "QuantizeLinear" and made.get(node.input[0]) in ("Gemm", "Add", "LayerNormalization")
        }
    assert scales["int8_minmax"].keys() == scales["int8_percentile"].keys() and scales["int8_minmax"]
    narrower = [scales["int8_percentile"][name] / scale for name, scale in scales["int8_minmax"].items()]
    assert max(narrower) < 1.01 and min(narrower) < 0.97


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_failed_export_is_reported_in_one_line(learnt, plain, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("an operator\nis unknown")

    monkeypatch.setattr(torch.onnx, "export", broken)
    results = execute(learnt, plain)
    assert results == {"error": "the export to ONNX failed: ValueError: an operator is unknown"}
    run = Run("esperberto-softmax1", "", None, damage={"executed": results})
    assert executed_section([run])[-1] == f"**esperberto-softmax1 was not executed in INT8**: {results['error']}"
    assert executed_section([Run("esperberto-softmax0", "", None)]) == []


def test_an_export_that_computes_another_function_is_refused(learnt, plain, monkeypatch):
    """The softmax1 model, exported as if its attention were softmax."""

    def softmax(model):
        copied = executed_copy(model)
        copied.config.softmax_n = 0.0
        return copied

    executed_copy = executed.measured_copy
    monkeypatch.setattr(executed, "measured_copy", softmax)
    results = execute(learnt, plain)
    assert set(results) == {"error"} and "the export changed the model" in results["error"]


def test_a_diverged_model_is_reported_in_one_line(learnt):
    broken = compensated_outlier(learnt, 0, 0, math.nan)
    results = execute(broken, damage_of(broken))
    assert set(results) == {"error"} and "float32 loss differs by nan" in results["error"]


def test_missing_packages_end_in_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "executed")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match="error: --onnxruntime needs onnx, onnxscript and onnxruntime"):
        analyze_kurtosis.main(["--onnxruntime"])


# --------------------------------------------------------------------------------------------------- the whole analysis


def test_the_analysis_treats_both_classes_alike(tmp_path, capsys):
    """The same function in the other class has the same figures; the JSON file and the report have both."""
    both_classes(tmp_path, scale=20.0)
    names = ("stock", "swapped", "learned")
    for name in names:  # ONNX Runtime refuses equal biases of two LayerNorms, as before training
        weights = load_file(tmp_path / name / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for key in sorted(weights):
            if "norm" in key.lower():
                weights[key] = weights[key] + 0.1 * torch.randn(weights[key].shape, generator=generator)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    texts = datasets.Dataset.from_dict({"text": TEXTS * 4})
    datasets.DatasetDict({"train": texts, "validation": texts}).save_to_disk(str(tmp_path / "data"))
    folders = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "results")]
    analyze_kurtosis.main([str(tmp_path / name) for name in names] + [*folders, "--onnxruntime"])
    runs = json.loads((tmp_path / "results" / "analysis.json").read_text(encoding="utf-8"))["runs"]
    results = [runs[name]["quantization"]["executed"] for name in names]
    assert all(results[0]["schemes"][name]["gap"] for name in FORMATS)
    for of_run in results:
        assert of_run.pop("latency")
    assert differences(*results[:2]) == []
    for of_run in results:
        assert all(scheme.pop("bytes") for scheme in of_run["schemes"].values())  # learned sinks make the file larger
    assert differences(results[0], results[2]) == []
    text = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert "## INT8 that is executed" in text and "INT8, executed, MinMax ranges, swapped" in text
    assert "Collecting" not in capsys.readouterr().out
