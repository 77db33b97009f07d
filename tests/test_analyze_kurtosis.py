"""analyze_kurtosis.py end to end on small random models, its figures by hand, and bad input."""

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import SMALL, TEXTS, save_tokenizer
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

import analyze_kurtosis
import experiment
import measurement
import sources
from answer import GLANCE
from arm_tables import entry_cell
from controls import CHECKS
from held_out import HELD_OUT_SEED, held_out_batches, held_out_loss, padded_batches
from kurtosis import weight_excess_kurtosis
from outliers import measure_model
from packing import MaskedLMCollator
from pictures import EMERGING, SEEDS
from questions import LABELS
from record import by_layer, weights_sha256
from runs import Run
from sets import notes
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM
from tables import duration, figure, gap_cell, plus_minus, table

SCRIPT = Path(analyze_kurtosis.__file__)
ARCHITECTURE = {**SMALL, "max_position_embeddings": 130}


def results_of(model, name, softmax_n):
    """The results file that train_model.py writes, with simple figures."""
    layers = {
        "attention.output.dense": (1.0, 4.0),
        "attention.output.dropout": (2.0, 2.5),
        "attention.output": (0, None),
    }
    layers |= {"output.dense": (6.0, 8.0), "output": (0.1, 0.2)}
    return {
        "run": name,
        "softmax_n": softmax_n,
        "seed": 42,
        "test_pipeline": False,
        "effective_batch_size": 16,
        "settings": {
            "learning_rate": 5e-5,
            "weight_decay": 0.0,
            "max_length": 512,
            "padded": True,
            "statistics_steps": 1,
        },
        "emergence_texts": 64,
        "emergence": [
            {"step": step, **{f"layer.{i}.{name}": step / 1e3 + i for i in range(2) for name in EMERGING | SEEDS}}
            for step in (0, 1000, 3000)
        ],
        "hardware": {"device": "cuda", "name": "NVIDIA H200", "count": 1},
        "dataset": {"sources": ["a", "b", "c", "d"], "train_samples": 1000, "sha256": "d" * 64},
        "tokenizer": {"entries": 300, "sha256": "e" * 64},
        "training": {
            "steps": 3000,
            "samples": 48000,
            "wall_seconds": 33340.6,
            "cost_usd": None,
            "loss_mean": 4.456,
        },
        "loss_history": [[1, 10.9], [1000, 5.004], [3000, 3.217]],
        "validation_loss_history": [[1000, 4.9], [3000, 3.3]],
        "validation": {"loss": 3.3, "perplexity": 27.11, "masked_tokens": 10, "samples": 4},
        "weight_excess_kurtosis": {
            parameter: value if math.isfinite(value) else None
            for parameter, value in weight_excess_kurtosis(model).items()
        },
        "activation_excess_kurtosis": {
            f"roberta.encoder.layer.{layer}.{module}": value
            for module, values in layers.items()
            for layer, value in enumerate(values)
        },
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """data/, models/ and results/ of two runs, as the scripts that run before this one write them."""
    root = tmp_path_factory.mktemp("finished")
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": texts, "validation": texts}).save_to_disk(str(root / "data"))
    (root / "data" / "manifest.json").write_text(json.dumps({"splits": {"train": {"sha256": "d" * 64}}}))
    (root / "results").mkdir()
    for name, n in (("esperberto-softmax1", 1.0), ("esperberto-softmax0", 0.0)):
        tokenizer = save_tokenizer(root / "models" / name)
        torch.manual_seed(int(n))
        architecture = {**ARCHITECTURE, "vocab_size": len(tokenizer)}
        if n:
            model = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**architecture, softmax_n=n))
        else:
            model = RobertaForMaskedLM(RobertaConfig(**architecture))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) ** 3 * 0.1)
        model.save_pretrained(root / "models" / name)
        (root / "results" / f"{name}.json").write_text(json.dumps(results_of(model, name, n)))
    return root


@pytest.fixture
def workplace(finished, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(autouse=True)
def clean_checkout(monkeypatch):
    """Otherwise the report has a note that it was measured with uncommitted code."""
    monkeypatch.setattr(measurement, "git_state", lambda: {"commit": "c", "dirty": False})


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes longer than measuring these models."""
    monkeypatch.setattr(analyze_kurtosis, "pictures", lambda *_: {})


def analyse(root, *argv):
    folders = {"results": "--results_dir", "models": "--models_dir", "data": "--data_dir"}
    analyze_kurtosis.main([*(part for name, flag in folders.items() for part in (flag, str(root / name))), *argv])


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def rows(text, section=None):
    """{first cell: the other cells} of every table in a Markdown text, or in one section of it."""
    if section:
        text = text.partition(f"## {section}")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: cells for first, *cells in lines}


# ---------------------------------------------------------------------------------------------------------- end to end


PICTURES = ("emergence_seeds", "damage", "kurtosis", "norms", "emergence", "loss", "attention_map", "histograms")


def test_report_of_two_runs(workplace, capsys):
    analyse(workplace, "--batch_size", "2")
    results = workplace / "results"
    text = (results / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    assert not list(results.glob("*.partial"))
    page = (results / "report.html").read_text(encoding="utf-8")
    for name in PICTURES:
        picture = (results / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and b"IHDR" in picture[:64]
        assert f"]({name}.png)" in text and base64.b64encode(picture).decode() in page
    assert "Note" not in text  # these two runs belong together
    assert 'name="viewport"' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # the page loads nothing from other files
    rules = [line for line in text.splitlines() if line.startswith("| ---")]
    assert page.count("<table>") == len(rules) > 8
    for markdown_table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in markdown_table.splitlines()}) == 1, markdown_table

    summary = rows(text, "Summary of the runs")
    published = ["published softmax0", "published softmax1"]
    ours = ["esperberto-softmax0", "esperberto-softmax1"]  # ordered by n, not by file name
    assert summary[""] == [*published, *ours]
    assert summary["training loss, mean of the whole run"] == ["4.46", "4.44", "4.46", "4.46"]
    assert summary["training loss, last logged"] == ["3.79", "3.78", "3.22", "3.22"]
    assert summary["held-out loss"] == ["–", "–", "3.30", "3.30"]
    assert summary["runtime"] == ["9 h 16 m", "9 h 16 m", "9 h 16 m", "9 h 16 m"]
    assert summary["cost, USD"] == ["11.22", "11.24", "–", "–"]
    assert summary["steps"] == ["285,899", "285,899", "3,000", "3,000"]
    # By hand: mean and population standard deviation of (1, 4) and (2, 2.5); a layer without a value; (6, 8).
    activations = rows(text, "Activations of attention.output")
    assert activations["dense, training"] == ["0.74 ± 0.29", "1.96 ± 1.58", "2.50 ± 1.50", "2.50 ± 1.50"]
    assert activations["dropout, training"] == ["1.15 ± 0.32", "2.51 ± 1.76", "2.25 ± 0.25", "2.25 ± 0.25"]
    assert activations["output (LayerNorm), training"] == ["0.77 ± 1.35", "0.90 ± 1.31", "–", "–"]
    # In eval mode dropout is the identity.
    assert activations["dropout, held-out"] == activations["dense, held-out"] != ["–"] * 4
    ffn_by_layer = rows(text, "A lead, not a result")
    assert ffn_by_layer["esperberto-softmax1, training"] == ["6.00", "8.00", *["–"] * 4, "7.00 ± 1.00"]
    assert ffn_by_layer["published softmax0, training"] == ["6.0", "8.3", "20.6", "78.3", "100.1", "4.5", "36.3 ± 38.3"]
    for said in ("population standard deviation", "no interval over seeds", "n = 2 layers", "n = 4 sequences"):
        assert said in text
    for said in ("train mode", "eval mode", "padding left out", "padding counted", "A lead, not a result"):
        assert said in text
    assert "a, b, c and 1 more (1,000 samples), 1 × NVIDIA H200" in text

    # One pair: figures, but no interval and no conclusion.
    for label in LABELS.values():
        assert f"\n- **{label}.** Open, from one pair (seed 42) nothing is concluded" in text
    primary = text.partition("## INT8, the primary question")[2].partition("\n## ")[0]
    assert "Open: one pair of 3,000 steps (seed 42), no test." in primary
    assert "Nothing can be concluded about softmax1" in primary
    glance = rows(text.partition("![")[0])
    assert glance[""] == ["softmax0", "softmax1", "difference", "95% interval over seeds", "95% interval over texts"]
    assert glance["null mass, mean of heads, %"][3] == "one pair: no interval"
    assert len(glance) == 2 + len(GLANCE)  # header and rule
    order = ("**Answer.**", "- **Sinks.**", "| **W8A8 static", "](emergence_seeds.png)", "## INT8", "## Summary")
    places = [text.index(part) for part in (*order, "## Quantization damage", "](damage.png)")]
    assert places == sorted(places) and "Dose response" not in text  # two arms


@pytest.mark.usefixtures("without_pictures")
def test_tables_show_the_figures_of_the_json_file(workplace):
    analyse(workplace)
    text = (workplace / "results" / "report.md").read_text(encoding="utf-8")
    runs = strict_json(workplace / "results" / "analysis.json")["runs"]
    run = runs["esperberto-softmax1"]
    norms = [run["places"][f"layer.{layer}.ffn_residual"]["inf_norm"] for layer in range(2)]
    assert rows(text, "Activations by place")["ffn_residual, softmax1"][3] == figure(max(norms))
    shares = [run["places"][f"layer.{layer}.ffn_residual"]["largest_channel_share"] for layer in range(2)]
    assert rows(text, "Activations by place")["ffn_residual, softmax1"][5] == figure(100 * max(shares))
    null = [figure(100 * np.mean(run["attention"][f"layer.{layer}"]["null_mass"])) for layer in range(2)]
    assert rows(text, "Attention")["% null, softmax1"] == null
    static = run["quantization"]["schemes"]["w8a8_static"]
    cell = rows(text, "Quantization damage")["W8A8, static per tensor"][1]
    assert cell == f"{static['loss']:.4f} / {figure(static['perplexity'])} / {gap_cell(static)}"
    assert len(static["draws"]) == 4 and static["gap"] == pytest.approx(np.mean(static["draws"]), abs=1e-5)
    check = dict(zip(CHECKS, rows(text, "Self-check of the instrument")["esperberto-softmax1"], strict=True))
    assert check["large_outlier"].startswith("undecided: the model has learnt")  # random weights use no context
    assert check["class_swap"].startswith("pass: gap") and run["quantization"]["self_check"]["passed"] is None
    # Full kurtosis, as Bondarenko et al. have it, of both their places.
    places = [
        run["places"][f"layer.{layer}.{place}"]["kurtosis_sequence"] + 3
        for layer in range(2)
        for place in ("ffn_output", "ffn_layernorm")
    ]
    assert rows(text, "Beside others' figures")["softmax1"][2] == figure(np.mean(places))


@pytest.mark.usefixtures("without_pictures")
def test_tables_of_sinks_heads_and_interventions_show_the_figures_of_the_json_file(workplace):
    analyse(workplace, "--batch_size", "2")
    text = (workplace / "results" / "report.md").read_text(encoding="utf-8")
    run = strict_json(workplace / "results" / "analysis.json")["runs"]["esperberto-softmax1"]
    by_layer = [run["attention"][f"layer.{layer}"] for layer in range(2)]
    table = rows(text, "Sinks and null mass")
    null = figure(100 * np.mean([layer["null_mass"] for layer in by_layer]))
    uniform = figure(100 * run["attention_uniform"]["null_mass"])
    assert table["null mass, softmax1"] == [null, "–", uniform] and run["untrained"] is None
    assert table["null mass, softmax0"][2] == "0.00" and 0 < run["attention_uniform"]["null_mass"] < 0.2
    assert run["attention_uniform"]["sequences"] + run["attention_uniform"]["sequences_short"] == len(TEXTS)
    short = figure(100 * np.mean([layer["sink_rate_any_renormalised_short"] for layer in by_layer]))
    assert table["sink rate, any, renormalised, short, softmax1"][0] == short
    assert rows(text, "Vectors of the heads")["largest logit, softmax1"] == [
        figure(max(x["logit_max"])) for x in by_layer
    ]
    top = [run["places"][f"layer.{layer}.ffn_residual"]["massive"]["top"][0] for layer in range(2)]
    largest = max(top, key=lambda entry: abs(entry["value"]))
    cell = rows(text, "Massive activations")["ffn_residual, softmax1"][3]
    assert cell.startswith(f"{figure(largest['value'])} ({figure(largest['ratio'])} medians): `")
    intervention = run["interventions"]["as_softmax0"]
    cells = rows(text, "Interventions")["attends with n = 0, softmax1"]
    assert cells[:3] == [
        f"{intervention['loss']:.4f}",
        figure(intervention["ffn_output_kurtosis"]),
        figure(intervention["residual_inf_norm"]),
    ]
    assert cells[4] == figure(100 * intervention["null_mass"]) and intervention["null_mass"] < 1e-6


def test_the_untrained_model_is_built_again_from_its_seed(tmp_path, monkeypatch):
    """It is returned only if its weights have the digest that training recorded."""
    monkeypatch.setattr(experiment, "ARCHITECTURE", ARCHITECTURE)
    for n in (0.0, 1.0):
        tokenizer = save_tokenizer(tmp_path / "model")
        first = experiment.build_model(n, len(tokenizer), tokenizer, 43)
        results = {"seed": 43, "model": {"initial_weights": weights_sha256(first)}}
        before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(1)
        first.save_pretrained(tmp_path / "model")
        model, _ = measurement.load(str(tmp_path / "model"))
        rebuilt = measurement.untrained_model(model, results)
        assert type(rebuilt) is type(first) and not rebuilt.training
        assert all(torch.equal(before[name], tensor) for name, tensor in rebuilt.state_dict().items())
        assert measurement.untrained_model(model, {**results, "seed": 42}) is None
        assert measurement.untrained_model(model, {"seed": 43, "model": {"path": "models"}}) is None
        assert measurement.untrained_model(model, None) is None


@pytest.mark.usefixtures("without_pictures")
def test_the_report_shows_step_0_beside_the_trained_model(workplace, monkeypatch):
    model, tokenizer = measurement.load(str(workplace / "models" / "esperberto-softmax1"))
    transformers.set_seed(42)
    before = type(model)(model.config).eval()
    edit_results(workplace, lambda results: results.update(model={"initial_weights": weights_sha256(before)}))
    analyse(workplace)
    runs = strict_json(workplace / "results" / "analysis.json")["runs"]
    assert runs["esperberto-softmax1"]["untrained"].keys() == {"places", "attention"}
    assert all(run["untrained"] is None or run["arm"] == "softmax1" for run in runs.values())
    ids = tokenizer(TEXTS)["input_ids"]
    _, attention, _ = measure_model(before, padded_batches(tokenizer, ids, 4), tokenizer)
    null_mass = runs["esperberto-softmax1"]["untrained"]["attention"]["layer.1"]["null_mass"]
    assert null_mass == pytest.approx(attention["layer.1"]["null_mass"], rel=1e-4)
    text = (workplace / "results" / "report.md").read_text(encoding="utf-8")
    expected = figure(100 * np.mean([layer["null_mass"] for layer in attention.values()]))
    assert rows(text, "Sinks and null mass")["null mass, softmax1"][1] == expected


def test_the_digest_of_weights_sees_every_tensor_and_not_their_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    digest = weights_sha256(model)
    names = sorted(model.state_dict())
    parts = (name.encode() + model.state_dict()[name].numpy().tobytes() for name in names)
    by_hand = hashlib.sha256(b"".join(parts)).hexdigest()
    assert digest == by_hand == weights_sha256(model.double())
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1].add_(1)
        assert weights_sha256(model) not in (digest, by_hand)
        digest = weights_sha256(model)


def test_histograms_do_not_depend_on_the_class_of_the_model(workplace):
    stock, tokenizer = measurement.load(str(workplace / "models" / "esperberto-softmax0"))
    ours = RobertaSoftmaxNForMaskedLM(
        RobertaSoftmaxNConfig(**ARCHITECTURE, vocab_size=len(tokenizer), softmax_n=1e-30)
    ).eval()
    ours.load_state_dict(stock.state_dict())
    batches = padded_batches(tokenizer, tokenizer(TEXTS)["input_ids"], 2)
    histograms = [measurement.ffn_histograms(model.eval(), batches) for model in (stock, ours)]
    assert histograms[0].keys() == histograms[1].keys() == {"layer 0", "layer 1"}
    for name, counts in histograms[0].items():  # a rounding error may move an entry to the next bin
        assert np.abs(counts - histograms[1][name]).sum() <= 4 < counts.sum()


def test_tokens_that_have_a_meaning_in_markdown_are_escaped():
    entry = {"value": -412.3, "ratio": 1830.0, "position": 0, "channel": 77}
    cells = [entry_cell({**entry, "token": token}, "layer 3") for token in ("<s>", " |", "`", "\ufffd", " ")]
    assert cells[0] == "-412 (1,830 medians): `<s>` at 0, channel 77, layer 3"
    assert [cell.split("`")[1] for cell in cells] == ["<s>", "¦", "'", "·", "_"] and "|" not in "".join(cells)


@pytest.mark.usefixtures("without_pictures")
def test_the_held_out_loss_equals_that_of_training(workplace):
    """The float32 loss of the analysis is held_out_loss on the validation split with training's masks."""
    analyse(workplace)
    damage = strict_json(workplace / "results" / "analysis.json")["runs"]["esperberto-softmax1"]["quantization"]
    model, tokenizer = measurement.load(str(workplace / "models" / "esperberto-softmax1"))
    masks = MaskedLMCollator(tokenizer, mlm_probability=0.15, seed=HELD_OUT_SEED)
    ids = tokenizer(TEXTS)["input_ids"]
    loss, count = held_out_loss(model, held_out_batches({"input_ids": ids}, masks, 3))
    assert damage["masked_tokens"] == count
    assert damage["schemes"]["float32"]["loss"] == pytest.approx(loss, rel=1e-5)
    analyse(workplace, "--max_scored", "2")
    damage = strict_json(workplace / "results" / "analysis.json")["runs"]["esperberto-softmax1"]["quantization"]
    ids = sorted(ids, key=len)
    loss, _ = held_out_loss(model, held_out_batches({"input_ids": [ids[0], ids[-1]]}, masks, 2))
    assert damage["sequences"] == 2 and damage["schemes"]["float32"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("without_pictures")
def test_texts_are_cut_where_training_cut_them_and_where_the_positions_end(workplace):
    for path in (workplace / "results").glob("*.json"):
        results = json.loads(path.read_text())
        results["settings"]["max_length"] = 20
        path.write_text(json.dumps(results))
    analyse(workplace)
    run = strict_json(workplace / "results" / "analysis.json")["runs"]["esperberto-softmax0"]
    _, tokenizer = measurement.load(str(workplace / "models" / "esperberto-softmax0"))
    assert tokenizer.model_max_length == 128  # of 130 positions RoBERTa uses all but two
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    assert max(lengths) > 20 and run["max_length"] == 20
    assert run["held_out_tokens"] == sum(min(length, 20) for length in lengths)
    assert "cut at 20 tokens, as in training" in (workplace / "results" / "report.md").read_text(encoding="utf-8")


def test_diverged_runs_and_losses_that_are_not_finite_are_reported(workplace, monkeypatch):
    """The analysis goes on, and the report has both in a picture, a table and a sentence."""
    results = json.loads(results_file(workplace).read_text())
    del results["activation_excess_kurtosis"], results["weight_excess_kurtosis"]
    results |= {
        "seed": 43,
        "status": "diverged",
        "diverged": {"step": 1200, "loss": None},
        "emergence_texts": 64,
        "emergence": [],
    }
    results |= {"weight_excess_kurtosis": {}, "activation_excess_kurtosis": {}, "validation_loss_history": []}
    results["training"] |= {"steps": 1200, "samples": 19200, "loss_mean": None}
    results["validation"] |= {"loss": None, "perplexity": None}
    results["loss_history"] = [[1, 10.9], [1000, 5.0], [1200, None]]
    (workplace / "results" / "esperberto-softmax1-seed43.json").write_text(json.dumps(results))
    measure_damage = measurement.measure_damage

    def overflowing(model, *rest, **keywords):
        written = measure_damage(model, *rest, **keywords)
        if model.config.model_type == "roberta":
            written["schemes"]["w8a8_static"] |= {"loss": math.nan, "perplexity": math.inf, "gap": math.nan}
        return written

    monkeypatch.setattr(measurement, "measure_damage", overflowing)
    monkeypatch.setattr(analyze_kurtosis, "git_state", lambda: {"commit": "c", "dirty": False})
    analyse(workplace)
    text = (workplace / "results" / "report.md").read_text(encoding="utf-8")
    assert "softmax0's loss after quantization is not finite in the one pair (seed 42)" in text
    assert "esperberto-softmax1-seed43 diverged at step 1,200" in text and "not a record" not in text
    assert rows(text, "Summary of the runs")["training"][2:] == ["complete", "complete", "diverged at step 1,200"]
    written = strict_json(workplace / "results" / "analysis.json")
    assert written["record"] is True and written["runs"]["esperberto-softmax1-seed43"]["diverged"] is True
    primary = written["comparisons"]["softmax1"]["w8a8_static_gap"]
    assert (primary["baseline_not_finite"], primary["lower"], primary["difference"]) == ([42], 1, None)


def test_copies_of_a_model_are_refused(workplace):
    shutil.copytree(model_folder(workplace), workplace / "models" / "esperberto-softmax1-seed43")
    copied = {**json.loads(results_file(workplace).read_text()), "seed": 43}
    (workplace / "results" / "esperberto-softmax1-seed43.json").write_text(json.dumps(copied))
    with pytest.raises(
        SystemExit, match=r"esperberto-softmax1 \(seed 42\) and .*-seed43 \(seed 43\) have the same weights"
    ):
        analyse(workplace)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(False, False, True), (False, ..., True), (True, False, False), (None, False, False), (False, True, False)],
)
def test_results_of_a_modified_checkout_are_not_a_record(monkeypatch, ours, theirs, expected):
    monkeypatch.setattr(analyze_kurtosis, "git_state", lambda: {"commit": None, "dirty": ours})
    results = {} if theirs is ... else {"git": {"commit": "c", "dirty": theirs}}
    assert analyze_kurtosis.is_record([Run("a", "a", results), Run("b", "b", None)]) is expected


@pytest.mark.usefixtures("without_pictures")
def test_figures_equal_scipy_and_single_unpadded_sequences(workplace):
    analyse(workplace)
    analysis = strict_json(workplace / "results" / "analysis.json")
    assert analysis["held_out"]["sequences"] == len(TEXTS) and analysis["versions"]["torch"]
    runs = analysis["runs"]
    for name, run in runs.items():
        folder = workplace / "models" / name
        for parameter, values in load_file(folder / "model.safetensors").items():
            if parameter == "softmax_n":  # the empty tensor that marks a softmax_n model
                continue
            expected = scipy.stats.kurtosis(values.double().numpy().ravel())
            assert run["parameters"][parameter]["kurtosis"] == pytest.approx(expected, rel=1e-9)
            assert run["parameters"][parameter]["inf_norm"] == values.abs().max().item()
        model, tokenizer = measurement.load(str(folder))
        model.eval()
        outputs = []
        module = model.roberta.encoder.layer[1].output.dense
        handle = module.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out[0]))
        with torch.no_grad():
            for text in TEXTS:
                model(**tokenizer(text, return_tensors="pt"))
        handle.remove()
        expected = np.mean([scipy.stats.kurtosis(out.double().numpy().ravel()) for out in outputs])
        measured = run["places"]["layer.1.ffn_output"]["kurtosis_sequence"]
        assert measured == pytest.approx(expected, abs=1e-4)
        assert run["activations_held_out"]["output.dense"]["layers"][1] == measured
        assert run["held_out_tokens"] == sum(map(len, outputs))


@pytest.mark.usefixtures("without_pictures")
def test_batch_size_changes_nothing_and_max_samples_takes_fewer(workplace):
    measured = {}
    for arguments in (("--batch_size", "1"), ("--batch_size", "4"), ("--batch_size", "4", "--max_samples", "2")):
        analyse(workplace, *arguments)
        run = strict_json(workplace / "results" / "analysis.json")["runs"]["esperberto-softmax1"]
        measured[arguments] = run["activations_held_out"]["attention.output.dense"]["layers"], run["held_out_tokens"]
    batch_of_1, batch_of_4, two_texts = measured.values()
    assert batch_of_1[0] == pytest.approx(batch_of_4[0], abs=1e-4) and batch_of_1[1] == batch_of_4[1]
    assert two_texts[0] != pytest.approx(batch_of_4[0], abs=1e-4) and two_texts[1] < batch_of_4[1]


def test_held_out_texts_are_spread_over_the_split(workplace):
    split = datasets.load_from_disk(str(workplace / "data"))["validation"]["text"]
    assert measurement.texts_of(workplace / "data", "validation", 2) == [split[0], split[-1]]
    assert measurement.texts_of(workplace / "data", "validation", 10_000) == list(split)


@pytest.mark.usefixtures("without_pictures")
def test_a_model_folder_without_results_file(workplace, capsys):
    elsewhere = workplace / "elsewhere" / "mine"
    elsewhere.parent.mkdir()
    (workplace / "models" / "esperberto-softmax1").rename(elsewhere)
    shutil.rmtree(workplace / "results")
    analyse(workplace, str(elsewhere))
    text = capsys.readouterr().out
    report = workplace / "results" / "mine"
    assert text.startswith((report / "report.md").read_text(encoding="utf-8"))
    assert text.startswith("# Outliers, attention sinks and quantization damage: mine\n")
    run = strict_json(report / "analysis.json")["runs"]["mine"]
    assert run["activations_training"]["attention.output"] is None
    norms = [run["places"][f"layer.{layer}.ffn_residual"]["inf_norm"] for layer in range(2)]
    headline = rows(text.partition("\n## ")[0])
    assert headline["residual stream: infinity norm, largest layer"] == [figure(max(norms))]
    sinks = [run["attention"][f"layer.{layer}"]["sink_rate_any"] for layer in range(2)]
    assert headline["sink rate of any token, %"] == [figure(100 * np.mean(sinks))]
    gap = gap_cell(run["quantization"]["schemes"]["w8a8_static"])
    assert headline["W8A8, static per tensor: loss over that"] == [gap]
    # The report does not mention the experiment, which this model is not part of.
    for word in ("softmax0", "softmax1", "Answer", "Question", "pair", "seed", "published softmax"):
        assert word not in text.partition("Written to")[0], word
    assert not (report / "loss.png").exists() and not (workplace / "results" / "report.md").exists()


@pytest.mark.usefixtures("without_pictures")
def test_a_named_folder_uses_its_results_file_and_equal_names_get_separate_files(workplace, capsys, monkeypatch):
    monkeypatch.chdir(workplace)  # names come from paths, and a whole path twice may be too long for a folder's name
    here, there = Path("models/esperberto-softmax0"), Path("other/esperberto-softmax0")
    shutil.copytree(here, there)
    analyse(workplace, f"{here}/")
    table_rows = rows(capsys.readouterr().out, "Summary of the runs")
    assert table_rows[""][2:] == ["esperberto-softmax0"] and table_rows["held-out loss"][2:] == ["3.30"]
    with pytest.raises(SystemExit, match="both softmax0 with seed 42"):  # one results file cannot belong to both
        analyse(workplace, str(here), str(there))
    (workplace / "results" / "esperberto-softmax0.json").unlink()
    analyse(workplace, str(here), str(there))
    both = [str(path).strip("/").replace("/", "--") for path in (here, there)]
    assert rows(capsys.readouterr().out.partition("\n## ")[0])[""] == both
    (folder,) = (workplace / "results").glob("*+*")
    assert folder.name == "+".join(both)
    kept = sorted(path.stem for path in (folder / "measured").iterdir())
    assert kept == sorted(both)  # both files are inside this folder
    with pytest.raises(SystemExit, match="have the same name: name each model once"):
        analyse(workplace, str(here), f"{here}/")


@pytest.mark.usefixtures("without_pictures")
def test_an_earlier_report_survives_a_failed_write(workplace):
    report = workplace / "results" / "report.md"
    report.write_text("earlier")
    (workplace / "results" / "report.md.partial").mkdir()  # its temporary name is taken
    with pytest.raises(OSError):
        analyse(workplace)
    assert report.read_text() == "earlier"


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_gap_below_its_noise_is_shown_as_such():
    gap = {"gap": 0.0301, "error": 0.002, "floor": 0.004}
    assert gap_cell(gap) == "+0.0301 ± 0.0020" and gap_cell({**gap, "gap": -0.0301}) == "-0.0301 ± 0.0020"
    assert gap_cell({**gap, "gap": -0.0039}) == gap_cell({**gap, "gap": 0.0039}) == "below its noise of 0.0040"
    assert gap_cell({"gap": 0.03, "error": math.nan, "floor": math.nan}) == "+0.0300"  # one text
    assert gap_cell({"gap": math.nan, "error": math.nan, "floor": math.nan}) == "not finite"  # it has diverged
    assert gap_cell({"gap": 0.0, "error": 0.0, "floor": 0.0}) == "–"  # float32 itself


def test_figures_have_three_digits():
    values = (math.nan, None, 0.0, 0.00123, 0.123, -1.5, 12.34, 1234.5, 2.5e7)
    assert [figure(value) for value in values] == "– – 0.00 0.0012 0.12 -1.50 12.3 1,234 2.50e+07".split()
    assert [figure(value) for value in (4e-5, -0.00049, math.inf)] == ["4.0e-05", "-4.9e-04", "inf"]


# --------------------------------------------------------------------------------------------------------------- parts


def test_layers_are_in_order_and_names_are_exact():
    kurtosis = {f"roberta.encoder.layer.{layer}.output.dense": float(layer) for layer in (10, 2, 0, 1)}
    kurtosis |= {
        "roberta.encoder.layer.1.attention.output.dense": 99.0,
        "roberta.encoder.layer.1.output.dense.weight": 98,
    }
    assert by_layer(kurtosis, "output.dense").tolist() == [0, 1, 2, 10]
    assert by_layer({"layer.0.output": None}, "output").tolist() == pytest.approx([math.nan], nan_ok=True)
    assert by_layer(kurtosis, "output").tolist() == []


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 2, 6], "3.00 ± 2.16"),  # sqrt(14 / 3); the sample deviation would be 2.65
        ([0.01, 0.05], "0.030 ± 0.020"),
        ([-0.01, -0.05], "-0.030 ± 0.020"),
        ([0.0, 0.4], "0.20 ± 0.20"),
        ([1, math.nan], "–"),
        ([], "–"),
    ],
)
def test_mean_and_population_deviation(values, shown):
    assert plus_minus(np.array(values, dtype=float)) == shown


def test_durations():
    assert [duration(seconds) for seconds in (59.6, 61, 3599, 33340.6)] == [
        "1 m 0 s",
        "1 m 1 s",
        "59 m 59 s",
        "9 h 16 m",
    ]
    assert [duration(seconds) for seconds in (3599.7, 7199, 36000)] == ["1 h 0 m", "2 h 0 m", "10 h 0 m"]


def test_table_is_markdown_that_lines_up():
    assert table(["", "a"], [["long", "1"], ["b", "22"]]).splitlines() == [
        "|      |   a |",
        "| ---- | --: |",
        "| long |   1 |",
        "| b    |  22 |",
    ]


def pair(finished):
    def run_of(name):
        results = json.loads((finished / "results" / f"{name}.json").read_text())
        weights = {parameter: {"kurtosis": value} for parameter, value in results["weight_excess_kurtosis"].items()}
        return Run(name, f"models/{name}", results, weights)

    return run_of("esperberto-softmax0"), run_of("esperberto-softmax1")


def test_results_of_another_model_get_a_note(finished, tmp_path):
    runs = pair(finished)
    name = "roberta.encoder.layer.0.attention.output.dense.weight"
    runs[0].weights[name]["kurtosis"] *= 1 + 1e-9  # rounding
    assert notes(runs, tmp_path) == []
    runs[0].weights[name]["kurtosis"] += 1e-4
    assert [line for line in notes(runs, tmp_path) if "do not belong together" in line and "softmax0" in line]
    del runs[1].weights[name]
    assert len(notes(runs, tmp_path)) == 2


def test_held_out_text_of_other_data_gets_a_note(finished, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": {"sha256": "0" * 64}}}))
    lines = notes(pair(finished), tmp_path)
    assert len(lines) == 2 and "esperberto-softmax0 was not trained on" in lines[0]


@pytest.mark.usefixtures("without_pictures")
def test_notes_about_pipeline_tests_and_seeds_precede_the_tables(workplace, capsys):
    for file in (workplace / "results").glob("*.json"):
        results = json.loads(file.read_text())
        file.write_text(json.dumps({**results, "test_pipeline": True, "seed": len(file.name)}))
    file.write_text(json.dumps({**results, "test_pipeline": True, "seed": 1}))
    analyse(workplace)
    text = capsys.readouterr().out
    assert text.index("**Note.** These tables show only that the pipeline works") < text.index("## Summary")
    assert text.index("Not every arm has seed") < text.index("## Summary")
    assert "**Answer.** None: --test_pipeline made these runs" in text
    assert "1 × NVIDIA H200, --test_pipeline" in text


@pytest.mark.usefixtures("without_pictures")
def test_constant_weights_are_null_in_json_and_a_dash_in_the_table(workplace, capsys):
    folder = workplace / "models" / "flat"
    tokenizer = save_tokenizer(folder)
    RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=len(tokenizer))).save_pretrained(folder)
    analyse(workplace, str(folder))
    run = strict_json(workplace / "results" / "flat" / "analysis.json")["runs"]["flat"]
    assert run["parameters"]["roberta.encoder.layer.0.attention.output.LayerNorm.weight"]["kurtosis"] is None
    assert rows(capsys.readouterr().out)["LayerNorm, flat"][0] == "–"


# ----------------------------------------------------------------------------------------------------------- bad input


def results_file(root):
    return root / "results" / "esperberto-softmax1.json"


def edit_results(root, change):
    results = json.loads(results_file(root).read_text())
    change(results)
    results_file(root).write_text(json.dumps(results))


def model_folder(root):
    return root / "models" / "esperberto-softmax1"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_train(root):
    shutil.rmtree(root / "data")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(root / "data"))


def empty_validation(root):
    shutil.rmtree(root / "data")
    empty = datasets.Dataset.from_dict({"text": []})
    datasets.DatasetDict({"train": empty, "validation": empty}).save_to_disk(str(root / "data"))


def without_tokenizer(root):
    for file in model_folder(root).glob("*tokenizer*"):
        file.unlink()


def without_mask_token(root):
    file = model_folder(root) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["mask_token"]
    file.write_text(json.dumps(settings))


def edit_config(root, change, name="config.json"):
    file = model_folder(root) / name
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tokenizer(root, change):
    edit_config(root, change, "tokenizer.json")


def link_in_a_circle(root):
    shutil.rmtree(model_folder(root))
    model_folder(root).symlink_to(model_folder(root))


def replace_model(model):
    return lambda root: model.save_pretrained(model_folder(root))


def stock_without_tokenizer(root):
    without_tokenizer(root)
    replace_model(RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=300)))(root)


DAMAGE = {
    "model of another n": (
        lambda root: edit_results(root, lambda results: results.update(softmax_n=2.0)),
        "has n = 1.0, but",
    ),
    "no results": (lambda root: shutil.rmtree(root / "results"), "no results in"),
    "no model folder": (lambda root: shutil.rmtree(model_folder(root)), "has no model folder"),
    "not JSON": (lambda root: truncate(results_file(root)), "esperberto-softmax1.json is not valid JSON"),
    "not UTF-8": (lambda root: results_file(root).write_bytes(b"\xff\xfe{"), "esperberto-softmax1.json is not valid"),
    "not an object": (lambda root: results_file(root).write_text("[]"), "esperberto-softmax1.json has no"),
    "missing key": (
        lambda root: edit_results(root, lambda results: results["training"].pop("loss_mean")),
        "esperberto-softmax1.json has no 'training.loss_mean'",
    ),
    "wrong type": (
        lambda root: edit_results(root, lambda results: results["training"].update(steps="many")),
        "esperberto-softmax1.json: 'training.steps' holds 'many'",
    ),
    "ragged history": (
        lambda root: edit_results(root, lambda results: results["loss_history"].append([5])),
        "esperberto-softmax1.json: 'loss_history' holds '[[",
    ),
    "words for numbers": (
        lambda root: edit_results(root, lambda results: results["activation_excess_kurtosis"].update(module="high")),
        "esperberto-softmax1.json: 'activation_excess_kurtosis' holds",
    ),
    "damaged model": (lambda root: truncate(model_folder(root) / "model.safetensors"), "is a damaged model folder"),
    "damaged config": (lambda root: truncate(model_folder(root) / "config.json"), "is a damaged model folder"),
    "no weights": (lambda root: (model_folder(root) / "model.safetensors").unlink(), "is a damaged model folder"),
    "no tokenizer": (without_tokenizer, "has no tokenizer that can be loaded ("),
    "stock model without tokenizer": (stock_without_tokenizer, "(it has no entries besides its special tokens)"),
    "tokenizer of another model": (
        replace_model(RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=100))),
        "the model 100",
    ),
    "no masked-LM head": (
        replace_model(RobertaModel(RobertaConfig(**ARCHITECTURE, vocab_size=300))),
        "not a complete masked language model",
    ),
    "fewer layers than the weights": (
        lambda root: edit_config(root, lambda config: config.update(num_hidden_layers=1)),
        "has fewer layers than the weights, which hold roberta.encoder.layer.1.",
    ),
    "config values of the wrong kind": (
        lambda root: edit_config(root, lambda config: config.update(hidden_size="wide")),
        "is a damaged model folder",
    ),
    "config nested too deep": (
        lambda root: (model_folder(root) / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000),
        "is a damaged model folder",
    ),
    "no masked language model": (
        replace_model(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400))),
        "(gpt2) is not a masked language model",
    ),
    "softmax under the name of softmax1": (
        replace_model(RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=400, softmax_n=1.0))),
        "says softmax_n = 1.0, but RobertaForMaskedLM attends with softmax",
    ),
    "tokenizer of an unknown type": (
        lambda root: edit_tokenizer(root, lambda tokenizer: tokenizer["model"].update(type="Unheard")),
        "has no tokenizer that can be loaded (",
    ),
    "tokenizer with a length in words": (
        lambda root: edit_config(root, lambda config: config.update(model_max_length="x"), "tokenizer_config.json"),
        "(roberta-softmax-n) cannot be measured",
    ),
    "results nested too deep": (
        lambda root: results_file(root).write_text("[" * 10_000 + "]" * 10_000),
        "esperberto-softmax1.json is not valid JSON",
    ),
    "a link in a circle": (link_in_a_circle, "esperberto-softmax1"),
    "another architecture": (
        replace_model(DistilBertForMaskedLM(DistilBertConfig(dim=16, n_layers=1, n_heads=2, vocab_size=400))),
        "(distilbert) has no layer.0.output.dense",
    ),
    "no data": (lambda root: shutil.rmtree(root / "data"), "no texts in the validation split of"),
    "no emergence step": (
        lambda root: edit_results(root, lambda results: results["emergence"][0].pop("step")),
        "'emergence' holds",
    ),
    "no mask token": (without_mask_token, "has no mask or no padding token"),
    "no validation split": (only_train, "no texts in the validation split of"),
    "empty validation split": (empty_validation, "no texts in the validation split of"),
}


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_input_ends_in_one_line(workplace, damage):
    spoil, said = DAMAGE[damage]
    spoil(workplace)
    with pytest.raises(SystemExit) as stop:
        analyse(workplace)
    message = stop.value.code
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert not (workplace / "results" / "report.md").exists()


@pytest.mark.parametrize(
    "argv", [["--max_samples", "0"], ["--batch_size", "-1"], ["--max_samples", "x"], ["--batch", "2"], ["--seed", "1"]]
)
def test_wrong_flags(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze_kurtosis.main(argv)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_missing_folder_ends_the_process_with_one_line(workplace):
    command = [sys.executable, str(SCRIPT), str(workplace / "models" / "nobody"), "--data_dir", str(workplace / "data")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: no model folder {workplace}/models/nobody"]


def test_a_hub_name_without_network_ends_the_process_with_one_line(workplace):
    command = [sys.executable, str(SCRIPT), "nobody/nothing", "--data_dir", str(workplace / "data")]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nobody/nothing is neither a folder here nor loadable from the Hub: ")


# ------------------------------------------------------------------------------------------ what was measured before


def test_a_second_analysis_measures_nothing_and_writes_the_same_bytes(workplace, monkeypatch, capsys):
    analyse(workplace)
    results = workplace / "results"
    written = {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    assert sorted(path.stem for path in (results / "measured").iterdir()) == [
        "esperberto-softmax0",
        "esperberto-softmax1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(analyze_kurtosis, "measure", lambda *_: pytest.fail("measured again"))
        capsys.readouterr()
        analyse(workplace)
        assert capsys.readouterr().err.count("measured before") == 2
    assert {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()} == written


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("what", ["weights", "text", "settings", "code", "results", "damaged", "unchecked"])
def test_a_run_is_measured_again_after_a_change(workplace, monkeypatch, what):
    analyse(workplace)
    kept = workplace / "results" / "measured" / "esperberto-softmax1.json"
    flags, again = [], {"esperberto-softmax1"}
    if what == "weights":
        model, _ = measurement.load(str(workplace / "models" / "esperberto-softmax1"))
        with torch.no_grad():
            model.base_model.embeddings.word_embeddings.weight.mul_(1.01)
        model.save_pretrained(workplace / "models" / "esperberto-softmax1")
    elif what == "text":
        flags, again = ["--max_samples", "3"], {"esperberto-softmax0", "esperberto-softmax1"}
    elif what == "settings":
        flags, again = ["--batch_size", "3"], {"esperberto-softmax0", "esperberto-softmax1"}
    elif what == "code":
        monkeypatch.setattr(measurement, "CODE", [*measurement.CODE, "report"])
        again = {"esperberto-softmax0", "esperberto-softmax1"}
    elif what == "results":
        file = workplace / "results" / "esperberto-softmax1.json"
        file.write_text(file.read_text().replace('"loss_mean": 4.456', '"loss_mean": 4.457'))
    elif what == "damaged":
        kept.write_text(kept.read_text()[:1000])
    else:
        contents = json.loads(kept.read_text())
        del contents["damage"]["self_check"]
        kept.write_text(json.dumps(contents))
    measured = set()
    whole = measurement.measure
    monkeypatch.setattr(analyze_kurtosis, "measure", lambda run, *rest: measured.add(run.name) or whole(run, *rest))
    analyse(workplace, *flags)
    assert measured == again


def test_a_report_needs_no_models_once_they_are_measured(workplace, monkeypatch, capsys):
    """Results files and measured files are enough for --report_only, without data, and for an analysis of more runs."""
    analyse(workplace)
    results = workplace / "results"
    written = {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    for path in list(results.iterdir()):
        if path.is_file() and not path.name.startswith("esperberto-"):
            path.unlink()
    shutil.rmtree(workplace / "models" / "esperberto-softmax1")
    monkeypatch.setattr(analyze_kurtosis, "measure", lambda *_: pytest.fail("measured again"))
    analyse(workplace)
    shutil.rmtree(workplace / "models" / "esperberto-softmax0")
    with pytest.raises(SystemExit, match=r"softmax0.json has no model folder .* other texts or other settings"):
        analyse(workplace, "--max_samples", "3")
    shutil.rmtree(workplace / "data")
    analyse(workplace, "--report_only")
    assert {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()} == written

    monkeypatch.setattr(analyze_kurtosis, "pictures", lambda *_: {})
    kept = results / "measured" / "esperberto-softmax1.json"
    contents = json.loads(kept.read_text())
    contents["made_with"]["code"] = "another"
    kept.write_text(json.dumps(contents | {"git": {"commit": "c", "dirty": True}}))
    analyse(workplace, "--report_only")
    told = strict_json(results / "analysis.json")
    assert (
        "Measured with different code (esperberto-softmax0 | esperberto-softmax1): compared nevertheless."
        in (told["notes"])
    )
    assert any(re.match("Measured from a modified tree.*softmax1", note) for note in told["notes"])
    assert told["record"] is False
    contents["made_with"]["texts_and_settings"] = "another"
    kept.write_text(json.dumps(contents))
    with pytest.raises(SystemExit, match="softmax0 and esperberto-softmax1 were measured on different texts"):
        analyse(workplace, "--report_only")
    for damage in (kept.read_text()[:1000], "[]", "{}"):
        kept.write_text(damage)
        with pytest.raises(
            SystemExit, match="missing, damaged or of another training: measure it, without --report_only"
        ):
            analyse(workplace, "--report_only")
    for flags in (["--onnxruntime"], ["SOME/MODEL"]):
        with pytest.raises(SystemExit):
            analyse(workplace, "--report_only", *flags)
        assert "--report_only measures nothing" in capsys.readouterr().err


def test_an_unwritable_folder_is_refused_before_measuring(workplace, monkeypatch):
    (workplace / "file").touch()
    monkeypatch.setattr(analyze_kurtosis, "measure", lambda *_: pytest.fail("measured"))
    model = str(workplace / "models" / "esperberto-softmax0")
    for flag in ("--results_dir", "--output_dir"):
        with pytest.raises(SystemExit, match=r"nothing can be written to .*file \(it is a file\)"):
            analyse(workplace, model, flag, str(workplace / "file"))


# ---------------------------------------------------------------------------------------- models outside the experiment


def own_text(root, name="own.txt", lines=TEXTS * 2):
    """A text file of different lines, a blank line, and a line that occurs twice."""
    file = root / name
    text = "\n".join([*(f"{line} {i}" for i, line in enumerate(lines)), "", "Pluvas. 3", ""])
    (gzip.open if name.endswith(".gz") else open)(file, "wt", encoding="utf-8").write(text)
    return file


@pytest.mark.usefixtures("without_pictures")
def test_named_models_do_not_change_the_report_of_the_experiment(workplace, monkeypatch):
    analyse(workplace)
    results = workplace / "results"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    model = str(workplace / "models" / "esperberto-softmax0")
    analyse(workplace, model, "--max_samples", "2")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {path.name for path in results.iterdir() if path.is_dir()} == {"measured", "esperberto-softmax0"}
    elsewhere = workplace / "elsewhere"
    monkeypatch.setattr(analyze_kurtosis, "measure", lambda *_: pytest.fail("measured again"))
    analyse(workplace, model, "--max_samples", "2")
    with pytest.raises(pytest.fail.Exception):  # another folder, so nothing was measured there
        analyse(workplace, model, "--max_samples", "2", "--output_dir", str(elsewhere))
    shutil.rmtree(elsewhere)
    analyse(workplace, "--output_dir", str(elsewhere))  # the experiment's report, of what lies in results/
    assert (elsewhere / "report.md").is_file() and not (elsewhere / "measured").exists()


@pytest.mark.usefixtures("without_pictures")
def test_two_models_that_are_a_pair_are_compared(workplace, capsys):
    analyse(workplace, *(str(workplace / "models" / f"esperberto-softmax{n}") for n in (0, 1)))
    assert "Open, from one pair (seed 42)" in capsys.readouterr().out
    assert (workplace / "results" / "esperberto-softmax0+esperberto-softmax1" / "report.md").is_file()


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["own.txt", "own.txt.gz"])
def test_own_text_is_divided_into_scored_and_calibration_lines(workplace, monkeypatch, capsys, name):
    shutil.rmtree(workplace / "data")
    file = own_text(workplace, name)
    given = []
    whole = measurement.measure
    monkeypatch.setattr(
        analyze_kurtosis, "measure", lambda run, texts, *rest: given.append(texts) or whole(run, texts, *rest)
    )
    analyse(workplace, str(workplace / "models" / "esperberto-softmax0"), "--text", str(file))
    (texts,) = given
    assert texts.held_out == texts.published == [f"{line} {i}" for i, line in enumerate(TEXTS * 2)][::2]
    assert texts.calibration == [f"{line} {i}" for i, line in enumerate(TEXTS * 2)][1::2]
    report = workplace / "results" / "esperberto-softmax0"
    assert strict_json(report / "analysis.json")["held_out"] == {"text": str(file), "sequences": 4}
    assert f"4 texts, evenly spread over every other line of {file}, cut at" in capsys.readouterr().out


def test_text_that_cannot_be_used_ends_in_one_line(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sources, "FREE_UNPACKED_BYTES", 1_000_000)
    (workplace / "utf-16").write_bytes("ĝis la revido\n".encode("utf-16-le") * 20)
    (workplace / "latin.txt").write_bytes("ĝis\n".encode("iso-8859-3") * 20)
    (workplace / "cut.gz").write_bytes(own_text(workplace, "own.gz").read_bytes()[:40])
    (workplace / "plain.gz").write_text("a\n" * 20)
    (workplace / "bomb.gz").write_bytes(gzip.compress(b"Pluvas.\n" * 200_000))
    own_text(workplace, "short.txt", TEXTS)
    model = str(workplace / "models" / "esperberto-softmax0")
    for name, said in {
        "utf-16": "utf-16 is not UTF-8 text",
        "latin.txt": "latin.txt is not UTF-8 text",
        "cut.gz": "cannot be read",
        "plain.gz": "cannot be read",
        "bomb.gz": "bomb.gz unpacks to more than 100 times its size",
        "short.txt": "short.txt has 4 different lines, and 8 are needed",
    }.items():
        with pytest.raises(SystemExit) as stop:
            analyse(workplace, model, "--text", str(workplace / name))
        assert stop.value.code.startswith("error: ") and said in stop.value.code and "\n" not in stop.value.code
    text = str(workplace / "short.txt")
    for argv in ([model, "--text", str(workplace / "none")], ["--text", text], [model, "--data_dir", text]):
        with pytest.raises(SystemExit) as stop:
            analyse(workplace, *argv)
        assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: {argv[-2]} ")


@pytest.mark.usefixtures("without_pictures")
def test_a_model_with_infinite_weights_is_left_out_and_the_others_are_reported(workplace, capsys):
    model, _ = measurement.load(str(model_folder(workplace)))
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.weight[0, 0] = math.inf
    model.save_pretrained(model_folder(workplace))
    with pytest.raises(SystemExit) as stop:
        analyse(workplace)
    said = "esperberto-softmax1 was not measured: its weights hold NaN or infinities, the first in "
    assert stop.value.code.startswith(f"error: 1 of 2 models left out: {said}roberta.encoder.layer.1.output.dense.")
    text = (workplace / "results" / "report.md").read_text(encoding="utf-8")
    assert f"**Note.** {said}" in text and rows(text, "Quantization damage")["float32"][0]
    assert list(strict_json(workplace / "results" / "analysis.json")["runs"]) == ["esperberto-softmax0"]
    with pytest.raises(SystemExit, match="error: nothing to report: esperberto-softmax1 was not measured"):
        analyse(workplace, str(model_folder(workplace)))


def test_a_damaged_model_is_refused_before_any_model_is_measured(workplace, monkeypatch):
    monkeypatch.setattr(analyze_kurtosis, "measure", lambda *_: pytest.fail("measured"))
    truncate(model_folder(workplace) / "model.safetensors")  # the second of the two
    named = [str(workplace / "models" / f"esperberto-softmax{n}") for n in (0, 1)]
    for models in ([], named, [named[0], str(workplace / "data" / "manifest.json")]):
        with pytest.raises(
            SystemExit, match=r"is a damaged model folder|no model folder .*manifest.json: that is a file"
        ):
            analyse(workplace, *models)
    assert not [path for path in (workplace / "results").iterdir() if path.is_dir()]  # not even an empty one


def test_help_has_the_examples_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        analyze_kurtosis.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and analyze_kurtosis.__doc__.strip() in shown
    assert re.search(r"--max_samples\b.*\(500\)", shown.replace("\n", " ").partition("options:")[2])
