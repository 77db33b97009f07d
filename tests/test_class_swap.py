"""The instrument must not know which arm it measures: swapping the class and keeping the function changes no figure.

n = 1e-30 stands for 0: the class of softmax_n models then computes softmax, to rounding. Whatever treats the arms
differently for another reason than their function shows here.
"""

import json
import math

import datasets
import pytest
import torch
from conftest import TEXTS, save_tokenizer
from test_tag_words import ARCHITECTURE, tagged_lines
from test_train_model import train  # noqa: F401  (a fixture)
from transformers import RobertaConfig, RobertaForMaskedLM

import analyze_kurtosis
import tag_words
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM

ZERO = 1e-30  # as n: exp(0) + ZERO is exp(0) in every format


def test_training_and_all_that_it_records(train):  # noqa: F811
    """Dropout included: both classes draw the same."""
    stock = train("--softmax_n", "0")
    swapped = train("--softmax_n", str(ZERO))
    assert swapped["run"] == "esperberto-softmax1e-30"
    assert stock["model"]["initial_weights"] == swapped["model"]["initial_weights"]
    for history in ("loss_history", "validation_loss_history"):
        for ours, theirs in zip(stock[history], swapped[history], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    for kind in ("weight_excess_kurtosis", "activation_excess_kurtosis"):
        for found in (
            stock,
            swapped,
        ):  # a key's bias moves no softmax: its gradient is rounding, of which Adam makes steps
            found[kind] = {name: value for name, value in found[kind].items() if not name.endswith("key.bias")}
        assert stock[kind] == pytest.approx(swapped[kind], rel=1e-3, abs=1e-3, nan_ok=True)
    for ours, theirs in zip(stock["emergence"], swapped["emergence"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)


def both_classes(folder, scale=1.0):
    """Folders stock/ and swapped/: the same weights, those of the attention's query and key times `scale`."""
    tokenizer = save_tokenizer(folder / "stock")
    save_tokenizer(folder / "swapped")
    settings = {**ARCHITECTURE, "vocab_size": len(tokenizer), "num_hidden_layers": 2}
    torch.manual_seed(0)
    stock = RobertaForMaskedLM(RobertaConfig(**settings, softmax_n=0.0))
    with torch.no_grad():
        for layer in stock.roberta.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight *= scale
    swapped = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**settings, softmax_n=ZERO))
    swapped.load_state_dict(stock.state_dict())
    stock.save_pretrained(folder / "stock")
    swapped.save_pretrained(folder / "swapped")


def differences(ours, theirs, place=""):
    """Where two results differ by more than rounding."""
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


def test_everything_that_an_analysis_writes(tmp_path):
    """Every figure of analysis.json, in models whose attention is far from uniform."""
    both_classes(tmp_path, scale=20.0)
    texts = datasets.Dataset.from_dict({"text": TEXTS * 4})
    datasets.DatasetDict({"train": texts, "validation": texts}).save_to_disk(str(tmp_path / "data"))
    folders = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "results")]
    analyze_kurtosis.main([str(tmp_path / "stock"), str(tmp_path / "swapped"), *folders])
    found = json.loads((tmp_path / "results" / "analysis.json").read_text(encoding="utf-8"))["runs"]
    stock, swapped = found["stock"], found["swapped"]
    check = [run["quantization"].pop("self_check") for run in (stock, swapped)]  # says which class it is
    assert all(one["class_swap"]["passed"] for one in check)
    for run in (stock, swapped):
        assert run.pop("model") and run.pop("arm")
    assert len(stock["quantization"]["ranges"]) == len(swapped["quantization"]["ranges"]) > 40
    assert differences(stock, swapped) == []


def test_fine_tuning_on_tagged_words(tmp_path, monkeypatch):
    both_classes(tmp_path)
    path = tmp_path / "tagged.conllu"
    path.write_text("\n".join(tagged_lines(30)), encoding="utf-8")
    parts = tag_words.split(tag_words.read_conllu(path))
    monkeypatch.setattr(tag_words, "LEARNING_RATE", 1e-2)
    losses, cross_entropy = {}, torch.nn.functional.cross_entropy
    for name in ("stock", "swapped"):
        losses[name] = []

        def spy(*args, kept=losses[name], **kwargs):
            loss = cross_entropy(*args, **kwargs)
            kept.append(loss.item())
            return loss

        monkeypatch.setattr(tag_words.F, "cross_entropy", spy)
        tag_words.fine_tune(str(tmp_path / name), parts, ["ADV", "NOUN", "VERB"], 0, 3, tag_words.tqdm(disable=True))
    assert losses["stock"][0] > 0.9 and losses["stock"] == pytest.approx(losses["swapped"], rel=1e-4)
