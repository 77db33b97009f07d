"""The measurement must not depend on the class of a model: another class with the same function changes no figure.

With n = 1e-30 instead of 0, the class of softmax_n models computes softmax, except for rounding. So do learned sinks if
n is 1e-30 or 0 in every head. These tests fail if something depends on the arm other than its function.
"""

import json
import math

import datasets
import pytest
import torch
from conftest import SMALL, TEXTS, save_tokenizer
from transformers import RobertaConfig, RobertaForMaskedLM

import analyze_kurtosis
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, learned_sinks

ZERO = 1e-30  # as n: exp(0) + ZERO is exp(0) in every format


def test_training_and_its_results_are_the_same_in_both_classes(train):
    """With dropout: both classes draw the same masks."""
    stock = train("--softmax_n", "0")
    swapped = train("--softmax_n", str(ZERO))
    assert swapped["run"] == "esperberto-softmax1e-30"
    assert stock["model"]["initial_weights"] == swapped["model"]["initial_weights"]
    for history in ("loss_history", "validation_loss_history"):
        for ours, theirs in zip(stock[history], swapped[history], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    for kind in ("weight_excess_kurtosis", "activation_excess_kurtosis"):
        # A bias of the keys does not change a softmax: its gradient is a rounding error, from which Adam makes steps.
        for result in (stock, swapped):
            result[kind] = {name: value for name, value in result[kind].items() if not name.endswith("key.bias")}
        assert stock[kind] == pytest.approx(swapped[kind], rel=1e-3, abs=1e-3, nan_ok=True)
    for ours, theirs in zip(stock["emergence"], swapped["emergence"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)


def both_classes(folder, scale=1.0):
    """Folders stock/, swapped/ and learned/ with the same weights; query and key weights are multiplied by `scale`."""
    tokenizer = save_tokenizer(folder / "stock")
    save_tokenizer(folder / "swapped")
    save_tokenizer(folder / "learned")
    settings = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 130}
    settings["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    stock = RobertaForMaskedLM(RobertaConfig(**settings, softmax_n=0.0))
    with torch.no_grad():
        for layer in stock.roberta.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight *= scale
    swapped = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**settings, softmax_n=ZERO))
    swapped.load_state_dict(stock.state_dict())
    learned = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**settings, softmax_n="learned"))
    learned.load_state_dict(stock.state_dict(), strict=False)
    for layer, log_n in zip(learned.roberta.encoder.layer, (math.log(ZERO), -math.inf), strict=True):
        torch.nn.init.constant_(layer.attention.self.log_n, log_n)
    for name, model in (("stock", stock), ("swapped", swapped), ("learned", learned)):
        model.save_pretrained(folder / name)


def differences(ours, theirs, place=""):
    """A line for each place where two results differ by more than rounding."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        return [line for key in ours for line in differences(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(ours, list):
        assert len(ours) == len(theirs), place
        return [line for i in range(len(ours)) for line in differences(ours[i], theirs[i], f"{place}[{i}]")]
    if isinstance(ours, float) and isinstance(theirs, float):
        same = math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-4)
    else:
        same = ours == theirs
    return [] if same else [f"{place}: {ours} and {theirs}"]


def analysed(folder, *names):
    """{name: results in analysis.json} of analyze_kurtosis.py for the models in these folders."""
    texts = datasets.Dataset.from_dict({"text": TEXTS * 4})
    datasets.DatasetDict({"train": texts, "validation": texts}).save_to_disk(str(folder / "data"))
    places = ["--data_dir", str(folder / "data"), "--output_dir", str(folder / "results")]
    analyze_kurtosis.main([str(folder / name) for name in names] + places)
    return json.loads((folder / "results" / "analysis.json").read_text(encoding="utf-8"))["runs"]


def test_every_figure_of_an_analysis_is_the_same_in_both_classes(tmp_path):
    """The figures in analysis.json, for models whose attention is far from uniform."""
    both_classes(tmp_path, scale=20.0)
    runs = analysed(tmp_path, "stock", "swapped", "learned")
    stock, swapped, learned = runs["stock"], runs["swapped"], runs["learned"]
    checks = [run["quantization"].pop("self_check") for run in runs.values()]  # says which class it is
    assert all(check["class_swap"]["passed"] for check in checks)
    sinks = [layer.pop("log_n") for layer in learned["attention"].values()]
    assert sinks == [[pytest.approx(math.log(ZERO))] * 2, [None] * 2]  # JSON cannot express infinity
    assert learned.pop("weights_sha256") != stock["weights_sha256"]
    for run in runs.values():
        assert run.pop("model") and run.pop("arm")
    assert len(stock["quantization"]["ranges"]) == len(swapped["quantization"]["ranges"]) > 40
    assert differences(stock, swapped) == []
    del stock["weights_sha256"]
    assert differences(stock, learned) == []


def test_learned_sinks_with_equal_values_are_measured_like_that_n(tmp_path):
    """n = 2 as a number, and n = 2 in every head. This fails if something ignores the sinks, or assumes n = 1."""
    both_classes(tmp_path, scale=20.0)
    for name, n in (("swapped", 2.0), ("learned", math.log(2))):
        model = RobertaSoftmaxNForMaskedLM.from_pretrained(tmp_path / name)
        if name == "swapped":
            model.config.softmax_n = n
        for parameter in learned_sinks(model).values():
            torch.nn.init.constant_(parameter, n)
        model.save_pretrained(tmp_path / name)
    number, learned = analysed(tmp_path, "swapped", "learned").values()
    for run in (number, learned):
        assert run.pop("model") and run.pop("arm") and run.pop("weights_sha256")
        assert all(check["passed"] is not False for check in [run["quantization"].pop("self_check")])
    assert [layer.pop("log_n") for layer in learned["attention"].values()] == [[pytest.approx(math.log(2))] * 2] * 2
    assert number["attention"]["layer.0"]["null_mass"][0] > 0.01
    assert differences(number, learned) == []
