"""train_model.py with a small architecture: pairing, repeatability, resuming, the record, bad input."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURE, as_flags
from datasets import Dataset, load_from_disk
from scipy import stats
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerState,
)
from transformers.trainer_callback import TrainerCallback

import arguments
import checkpoints
import command
import experiment
import folder
import measurement
import record
import train_model
import trainer as trainer_module
from controls import CONTROLS
from experiment import accept_packed_batches
from held_out import held_out_batches, held_out_loss, losses_without_context, padded_batches
from outliers import FFN_PLACES, Emergence, measure_model, sinks_by_layer
from packing import MaskedLMCollator
from runs import find_runs
from sets import comparison_sets
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, learned_sinks

ROOT = Path(__file__).parent.parent


def exits_with(capsys, text: str, call) -> None:
    """`call` ends with one line on stderr that contains `text`, and with a non-zero status."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = str(caught.value)
    assert caught.value.code not in (0, None)
    assert text in message and "\n" not in message and message.startswith("error: ")


def weights(folder) -> dict:
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


# ----------------------------------------------------------------------------------------------- pairing, repeatability


def test_arms_see_identical_batches_and_masks_and_start_from_identical_weights(train, monkeypatch):
    seen = []
    step = train_model.ExperimentTrainer.training_step

    def spy(self, model, inputs, *rest):
        if not seen[-1]:
            seen[-1].append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        seen[-1].append({name: torch.as_tensor(value).clone() for name, value in inputs.items()})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(train_model.ExperimentTrainer, "training_step", spy)
    for n in ("0", "1"):
        seen.append([])
        # More than two epochs of the 590 samples, in batches of 128, so that the shuffling of an epoch is compared too.
        train("--softmax_n", n, "--per_device_train_batch_size", "128", "--max_length", "16", steps=11)
    assert len(seen[0]) == len(seen[1]) == 12
    for ours, theirs in zip(*seen, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(seen[0][1]["input_ids"][0, :9], seen[0][6]["input_ids"][0, :9])


def test_two_seeded_runs_agree_bitwise_and_another_seed_does_not(train):
    first = train("--use_softmax1")
    again = train("--use_softmax1", results="again")
    other = train("--use_softmax1", "--seed", "43", results="other")
    assert first["loss_history"] == again["loss_history"] and len(first["loss_history"]) == 6
    assert first["activation_excess_kurtosis"] == again["activation_excess_kurtosis"]
    before, after = weights("results-models/esperberto-softmax1"), weights("again-models/esperberto-softmax1")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert first["loss_history"] != other["loss_history"]
    assert other["run"] == "esperberto-softmax1-seed43"


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def interrupted(monkeypatch, call) -> None:
    """`call` trains, and is interrupted after its fourth step."""
    init = train_model.ExperimentTrainer.__init__

    def stopping(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(StopAfter())

    with monkeypatch.context() as patch:
        patch.setattr(train_model.ExperimentTrainer, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            call()


def test_an_interrupted_run_continues_and_ends_like_an_uninterrupted_one(train, monkeypatch, capsys):
    expected = train("--use_softmax1", results="whole")

    interrupted(monkeypatch, lambda: train("--use_softmax1"))
    assert not Path("results/esperberto-softmax1.json").exists()

    exits_with(capsys, "made with softmax_n", lambda: train("--output_dir", "results-models/esperberto-softmax1"))
    exits_with(capsys, "learning_rate", lambda: train("--use_softmax1", "--learning_rate", "1e-4"))
    resumed = train("--use_softmax1")
    assert resumed["loss_history"] == expected["loss_history"]
    assert resumed["validation"] == expected["validation"]
    assert resumed["emergence"] == expected["emergence"]
    for name in ("steps", "samples", "tokens", "padded_tokens", "loss_mean"):
        assert resumed["training"][name] == expected["training"][name]
    assert resumed["activation_excess_kurtosis"] == expected["activation_excess_kurtosis"]
    before, after = weights("whole-models/esperberto-softmax1"), weights("results-models/esperberto-softmax1")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(Path("results-models").glob("*/checkpoint-*"))  # the run is complete, and will not be resumed


def test_a_clock_that_is_set_back_changes_nothing(train, monkeypatch):
    """The clock runs backwards during the training, and when it continues, its files are dated in the far future."""
    train(results="whole")
    clock = itertools.count(2e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    interrupted(monkeypatch, train)
    [checkpoint] = Path("results-models/esperberto-softmax0").glob("checkpoint-*")
    for path in [*checkpoint.rglob("*"), checkpoint, Path("results-models/esperberto-softmax0.lock")]:
        path.touch()
        os.utime(path, (3e9, 3e9))
    result = train()
    assert 0 < result["training"]["wall_seconds"] < 600 and next(clock) < 2e9 - 1000
    name = "models/esperberto-softmax0/model.safetensors"
    assert Path(f"results-{name}").read_bytes() == Path(f"whole-{name}").read_bytes()


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_before_it_ends_the_training(train, monkeypatch, capsys, number):
    expected = train(results="whole")
    step = train_model.ExperimentTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train_model.ExperimentTrainer, "training_step", signalled)
        with pytest.raises(SystemExit) as end:
            train()
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    assert "stopped at step 5: the same command goes on" in capsys.readouterr().out
    assert [path.name for path in Path("results-models").glob("*/checkpoint-*")] == ["checkpoint-5"]
    resumed = train()
    assert resumed["loss_history"] == expected["loss_history"] and resumed["validation"] == expected["validation"]


@pytest.fixture
def default_sigint():
    """SIGINT as in a terminal. If a shell's & started the tests it is ignored, and training would not change that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_a_second_signal_ends_at_once(train, monkeypatch):
    def twice(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_model.ExperimentTrainer, "training_step", twice)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_incomplete_checkpoint_is_skipped(train, monkeypatch, capsys):
    expected = train(results="whole")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    write = record.write_json
    for step, others in ((3, ()), (6, (3,))):  # killed in the first checkpoint, then in the second

        def until(path, value, step=step):
            killed() if Path(path).parent.name == f"checkpoint-{step}" else write(path, value)

        with monkeypatch.context() as patch:
            patch.setattr(record, "write_json", until)
            with pytest.raises(KeyboardInterrupt):
                train()
        left = {path.name for path in Path("results-models/esperberto-softmax0").glob("checkpoint-*")}
        assert left == {f"checkpoint-{number}" for number in (*others, step)}
        capsys.readouterr()
    resumed = train()
    printed = capsys.readouterr().out
    assert "checkpoint-6 was interrupted while it was written: deleted\nGoing on from" in printed
    assert resumed["loss_history"] == expected["loss_history"] and resumed["validation"] == expected["validation"]


def test_a_damaged_checkpoint_is_skipped_if_there_is_an_older_one(train, monkeypatch, capsys):
    flags = ["--save_steps", "1", "--save_total_limit", "2"]
    expected = train(*flags, results="whole")
    interrupted(monkeypatch, lambda: train(*flags))
    folder = Path("results-models/esperberto-softmax0")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    flip(folder / "checkpoint-3" / "model.safetensors", 0.9)  # a byte of the weights: the file can still be loaded
    capsys.readouterr()
    resumed = train(*flags)
    printed = capsys.readouterr().out
    assert (
        "checkpoint-3 is damaged (model.safetensors: not as SHA256SUMS has it): deleted" in printed
        and f"Going on from {folder}/checkpoint-2" in printed
    )
    assert resumed["loss_history"] == expected["loss_history"] and resumed["validation"] == expected["validation"]


def flip(file: Path, where: float) -> None:
    """Change one byte of the file: 0 is its start, 1 its end."""
    data = bytearray(file.read_bytes())
    data[min(int(where * len(data)), len(data) - 1)] ^= 1
    file.write_bytes(data)


def test_a_byte_that_changed_in_any_file_of_a_checkpoint_is_found(train, monkeypatch):
    interrupted(monkeypatch, train)
    [checkpoint] = Path("results-models/esperberto-softmax0").glob("checkpoint-*")
    files = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "progress.json", "SHA256SUMS"} <= {
        path.name for path in files
    }
    assert "training_args.bin" not in {path.name for path in files}  # a pickle
    for path, content in files.items():
        for where in (0, 0.5, 0.9, 1):
            flip(path, where)
            assert "is damaged (" in (why := checkpoints.damage(checkpoint)) and path.name in why, (path, where)
            path.write_bytes(content)
        path.unlink()
        assert path.name == "SHA256SUMS" or checkpoints.damage(checkpoint), path  # a copy may lack it
        path.write_bytes(content)
    (checkpoint / ".DS_Store").write_bytes(b"made by macOS")
    assert checkpoints.damage(checkpoint) is None
    (checkpoint / "pytorch_model.bin").write_bytes(b"added later")
    assert "is damaged (pytorch_model.bin: not as" in checkpoints.damage(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    sums = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    if shutil.which(sums[0]):
        subprocess.run(sums, cwd=checkpoint, check=True)


def test_an_older_checkpoint_is_deleted_only_after_the_new_one_is_complete(train, monkeypatch):
    deleted = []
    remove = shutil.rmtree

    def spied(path, *rest, **options):
        deleted.append(Path(path).name)
        assert [checkpoints.damage(left) for left in checkpoints.checkpoints(Path(path).parent)[:1]] == [None]
        remove(path, *rest, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", spied)
    train("--save_steps", "1", steps=3)
    assert deleted == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


class WritesFile:
    """An object that writes a file when it is unpickled by a loader that runs code."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_code_in_a_checkpoint_is_not_run(train, monkeypatch, capsys):
    """In a checkpoint from somebody else, with checksums that fit."""
    interrupted(monkeypatch, train)
    [checkpoint] = Path("results-models/esperberto-softmax0").glob("checkpoint-*")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        there = (checkpoint / name).read_bytes()
        torch.save({"state": WritesFile()}, checkpoint / name)
        (checkpoint / "SHA256SUMS").unlink()
        checkpoints.seal(checkpoint)
        exits_with(capsys, "is damaged (Weights only load failed", train)
        (checkpoint / name).write_bytes(there)
    torch.save(WritesFile(), checkpoint / "training_args.bin")  # Trainer itself would write this file
    checkpoints.seal(checkpoint)
    train()
    assert not Path("ran").exists()


def test_a_run_that_another_process_trains_is_refused(train, capsys):
    with folder.locked("results-models/esperberto-softmax0"):
        exits_with(capsys, f"process {os.getpid()} is at work on results-models/esperberto-softmax0: wait", train)
        train("--use_softmax1")  # another run is not affected
    train()


def test_a_run_that_was_killed_after_its_last_step_is_not_trained_further(train, monkeypatch):
    expected = train("--lr_scheduler_type", "constant", results="whole")
    write = record.write_json

    def full(path, value):
        if Path(path).parent.name == "results":
            raise OSError("No space left on device")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            train("--lr_scheduler_type", "constant")
    resumed = train("--lr_scheduler_type", "constant")
    for key in ("loss_history", "validation_loss_history", "validation", "emergence", "weight_excess_kurtosis"):
        assert resumed[key] == expected[key]
    for name in ("steps", "samples", "tokens", "padded_tokens", "loss_mean"):
        assert resumed["training"][name] == expected["training"][name]


def test_resume_from_checkpoint_takes_a_path_or_true(train, monkeypatch, capsys):
    """test_bad_input.py has the values that are refused, for example damaged checkpoints."""
    interrupted(monkeypatch, train)
    folder = Path("results-models/esperberto-softmax0")
    for wanted in (None, "True", "true", f"{folder}/checkpoint-3"):
        assert checkpoints.checkpoint_to_go_on_from(wanted, str(folder)) == f"{folder}/checkpoint-3"
    capsys.readouterr()
    train("--resume_from_checkpoint", f"{folder}/checkpoint-3")
    assert f"Going on from {folder}/checkpoint-3" in capsys.readouterr().out


def test_statistics_that_are_not_finite_stay_so_after_a_resumption(tmp_path):
    progress = {"settings": {}, "seconds": 1, "counts": {"samples": 1, "tokens": 2, "padded_tokens": 2}}
    progress |= {"activation_kurtosis": {"a": [None, 3]}, "emergence": [], "loss_window": [5, None]}
    record.write_json(tmp_path / "progress.json", progress)
    read = checkpoints.read_progress(tmp_path)
    assert math.isnan(read["activation_kurtosis"]["a"][0]) and math.isnan(read["loss_window"][1][0])


# ------------------------------------------------------------------------------------------------------ held-out loss


def test_held_out_loss_is_the_mean_over_masked_tokens_for_every_batch_size(sample):
    data = load_from_disk(sample / "data")["validation"]
    masks = MaskedLMCollator(AutoTokenizer.from_pretrained(sample / "tokenizer"), mlm_probability=0.15, seed=1)
    ids = [masks.tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in data["text"][:23]]
    data = {"input_ids": ids}
    torch.manual_seed(0)
    config = RobertaConfig(**ARCHITECTURE, vocab_size=1024)
    model = accept_packed_batches(RobertaForMaskedLM(config)).train()
    by_size = [held_out_batches(data, masks, size) for size in (1, 4, 23)]
    losses = [held_out_loss(model, batches) for batches in by_size]
    assert model.training
    assert len({count for _, count in losses}) == 1
    model.eval()
    stock = RobertaForMaskedLM(config).eval()
    stock.load_state_dict(model.state_dict())
    total = count = 0
    for batch in by_size[0]:
        logits = stock(batch["input_ids"]).logits[0].double()
        chosen = batch["labels"][0] != -100
        total += F.cross_entropy(logits[chosen], batch["labels"][0][chosen], reduction="sum").item()
        count += chosen.sum().item()
    assert losses[0][1] == count
    for loss, _ in losses:
        assert loss == pytest.approx(total / count, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- the record


def test_losses_without_context_are_that_of_the_frequencies_and_that_of_the_best_guess(sample):
    """In a text of independent tokens, the best guess without context follows from counts."""
    tokenizer = AutoTokenizer.from_pretrained(sample / "tokenizer")
    draw = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    ids = draw.choice(np.arange(100, 104), p=p, size=(4_000, 60)).tolist()
    text = Dataset.from_dict({"input_ids": ids})
    collator = MaskedLMCollator(tokenizer=tokenizer, mlm_probability=0.5, seed=0)
    batches = held_out_batches(text, collator, 500)
    unigram, best = losses_without_context(text, batches, tokenizer, 1024)
    assert unigram == pytest.approx(stats.entropy(p), abs=0.01)
    counted: dict[int, np.ndarray] = {}
    for batch in batches:
        masked = batch["labels"] != -100
        for shown, label in zip(batch["input_ids"][masked].tolist(), batch["labels"][masked].tolist(), strict=True):
            counted.setdefault(shown, np.zeros(4))[label - 100] += 1
    total = sum(labels.sum() for labels in counted.values())
    by_hand = sum(labels.sum() / total * stats.entropy(labels / labels.sum()) for labels in counted.values())
    assert best == pytest.approx(by_hand, abs=0.02) and best < unigram - 0.05


@pytest.mark.parametrize(("flag", "n"), [("--softmax_n=0", 0), ("--use_softmax1", 1), ("--softmax_n=0.5", 0.5)])
def test_record_and_saved_model(train, sample, flag, n):
    result = train(flag, "--usd_per_hour", "3600")
    run = f"esperberto-softmax{n:g}"
    folder = Path("results-models") / run
    assert result["run"] == run and result["softmax_n"] == n and result["seed"] == 42
    assert result["effective_batch_size"] == 4
    assert result["training"]["steps"] == 6 and result["training"]["samples"] == 24
    assert 24 * 3 < result["training"]["tokens"] == result["training"]["padded_tokens"]  # no padding
    assert result["training"]["cost_usd"] == pytest.approx(result["training"]["wall_seconds"])
    assert [step for step, _ in result["loss_history"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in result["validation_loss_history"]] == [3, 6]
    assert [entry["step"] for entry in result["emergence"]] == [0, 1, 2, 3, 4, 5, 6]
    last = result["emergence"][-1]
    assert last["layer.1.ffn_output.inf_norm"] > 0 and (last["layer.0.attention.null_mass"] > 0.001) == (n > 0)
    assert result["validation"]["perplexity"] == pytest.approx(math.exp(result["validation"]["loss"]))
    assert result["settings"]["learning_rate"] == 5e-5 and result["settings"]["weight_decay"] == 0
    assert (
        result["dataset"]["sha256"]
        == json.loads((sample / "data/manifest.json").read_text())["splits"]["train"]["sha256"]
    )

    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is (RobertaSoftmaxNForMaskedLM if n else RobertaForMaskedLM)
    assert n == 0 or model.config.softmax_n == n
    assert len(AutoTokenizer.from_pretrained(folder)) == 1024
    for name, parameter in model.named_parameters():
        expected = stats.kurtosis(parameter.detach().double().numpy(), axis=None)
        recorded = result["weight_excess_kurtosis"][name]
        assert math.isnan(expected) if recorded is None else recorded == pytest.approx(expected, rel=1e-6)
    # Every module except the root and the dropout of the attention, which our kernels do not call.
    modules = {name for name, _ in model.named_modules() if name and not name.endswith("attention.self.dropout")}
    modules -= {"roberta.encoder.layer"}  # a list of layers, which is not called
    assert set(result["activation_excess_kurtosis"]) == modules


def test_config_overrides_change_the_size_and_are_recorded(train):
    overrides = " num_attention_heads=2, hidden_size=16 ,intermediate_size=24"
    result = train("--config_overrides", overrides, "--softmax_n", "1")
    config = AutoModelForMaskedLM.from_pretrained("results-models/esperberto-softmax1").config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 2, 24)
    assert config.num_hidden_layers == ARCHITECTURE["num_hidden_layers"]
    # Always written in the same way, whatever the order and the spaces, so that runs can be compared.
    assert result["settings"]["config_overrides"] == "hidden_size=16,intermediate_size=24,num_attention_heads=2"


@pytest.mark.parametrize("n", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_emergence_is_what_the_analysis_measures_on_the_same_texts(train, sample, n):
    """The last entry is that of the saved model, and the first that of the model with its initial weights."""
    result = train("--softmax_n", str(n), "--max_length", "512")  # the length of the analysis
    assert result["emergence_texts"] == train_model.EMERGENCE_TEXTS
    texts = measurement.texts_of(sample / "data", "validation", train_model.EMERGENCE_TEXTS)
    folder = f"results-models/esperberto-softmax{n}"
    trained, tokenizer = measurement.load(folder)
    batches = padded_batches(tokenizer, measurement.token_ids(tokenizer, texts), 7)
    untrained = experiment.build_model(n, 1024, tokenizer, 42)
    for model, entry in ((untrained, result["emergence"][0]), (trained, result["emergence"][-1])):
        places, attention, _ = measure_model(model, batches, tokenizer)
        assert len(entry) == 1 + 2 * (9 + len(Emergence.ATTENTION))
        for layer in ("layer.0", "layer.1"):
            for statistic in Emergence.STATISTICS:
                for place in FFN_PLACES:
                    expected = places[f"{layer}.{place}"][statistic]
                    assert entry[f"{layer}.{place}.{statistic}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            for statistic in Emergence.ATTENTION:
                expected = np.mean(attention[layer][statistic])
                assert entry[f"{layer}.attention.{statistic}"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("control", ["clipped", "gated"])
def test_controls_are_separate_arms_with_the_initial_weights_of_softmax0(train, control):
    softmax0 = train("--softmax_n", "0")
    result = train("--control", control)
    assert result["run"] == f"esperberto-{control}" and result["settings"]["control"] == control
    assert result["model"]["initial_weights"] == softmax0["model"]["initial_weights"]
    beyond = 2 * (32 * 4 + 4) if control == "gated" else 0  # a linear layer with a gate for each head
    assert result["model"]["gate_parameters"] == beyond
    assert result["model"]["parameters"] == softmax0["model"]["parameters"] + beyond
    assert result["loss_history"] != softmax0["loss_history"] and result["status"] == "complete"
    runs = find_runs([], Path("results"), Path("results-models"))
    assert [run.arm for run in runs] == ["softmax0", control]
    [group] = comparison_sets(runs)
    assert list(group.pairs) == [control] and not group.refused
    model = AutoModelForMaskedLM.from_pretrained(f"results-models/esperberto-{control}")
    assert type(model) is CONTROLS[control][1]


def test_learned_sinks_are_a_separate_arm_that_starts_like_softmax1(train):
    softmax0, softmax1 = train("--softmax_n", "0"), train("--softmax_n", "1")
    result = train("--softmax_n", "learned", "--learning_rate", "1e-2", "--weight_decay", "0.5", "--overwrite")
    assert result["run"] == "esperberto-softmax_learned" and result["softmax_n"] == "learned"
    assert result["model"]["initial_weights"] == softmax0["model"]["initial_weights"]
    assert result["model"]["sink_parameters"] == 2 * 4 and softmax0["model"]["sink_parameters"] == 0
    assert result["model"]["parameters"] == softmax0["model"]["parameters"] + 2 * 4
    assert result["loss_history"][0] == softmax1["loss_history"][0]  # n = 1
    heads = result["log_n"]
    assert {layer: len(log_n) for layer, log_n in heads.items()} == {"layer.0": 4, "layer.1": 4}
    assert not any(0 in log_n for log_n in heads.values())
    assert softmax0["log_n"] == softmax1["log_n"] == {}
    assert result["weight_excess_kurtosis"].keys() == softmax0["weight_excess_kurtosis"].keys()
    for layer, log_n in heads.items():  # during training: from n = 1 to the final value
        grown = [entry[f"{layer}.attention.log_n"] for entry in result["emergence"]]
        assert grown[0] == 0 and grown[-1] == pytest.approx(np.mean(log_n))
    model, _ = measurement.load("results-models/esperberto-softmax_learned")
    assert {name: list(log_n) for name, log_n in heads.items()} == sinks_by_layer(model)
    result = train("--softmax_n", "learned", "--overwrite")  # with the settings of the other arms
    [group] = comparison_sets(find_runs([], Path("results"), Path("results-models")))
    assert [run.arm for run in group.runs] == ["softmax0", "softmax1", "softmax_learned"] and not group.refused
    assert list(group.pairs) == ["softmax1", "softmax_learned"]
    assert measurement.untrained_model(model, result) is not None


def test_sinks_are_not_decayed():
    """Trainer itself would apply weight decay to them, which pulls every n to 1."""
    config = RobertaSoftmaxNConfig(**ARCHITECTURE, vocab_size=99, softmax_n="learned")
    model, trainer = RobertaSoftmaxNForMaskedLM(config), train_model.ExperimentTrainer
    decayed = trainer.get_decay_parameter_names(trainer.__new__(trainer), model)
    others = super(trainer, trainer).get_decay_parameter_names(trainer.__new__(trainer), model)
    assert set(others) - set(decayed) == set(learned_sinks(model)) and len(learned_sinks(model)) == 2


def test_training_time_kurtosis_of_padded_batches_is_the_published_definition(train, monkeypatch):
    """In train mode, over all tokens and channels of a sample, padding included, then averaged: compared with scipy."""
    seen = {"roberta.encoder.layer.1.output.dense": [], "lm_head.decoder": []}
    build = train_model.build_model

    def watched(*args):
        model = build(*args)
        for name, found in seen.items():
            model.get_submodule(name).register_forward_hook(
                lambda module, _, output, found=found: found.extend(output.detach()) if module.training else None
            )
        return model

    monkeypatch.setattr(train_model, "build_model", watched)
    result = train("--padded", "--statistics_steps", "1", steps=3)
    for name, found in seen.items():
        assert len(found) == 12
        expected = np.mean([stats.kurtosis(sample.double().numpy(), axis=None) for sample in found])
        assert result["activation_excess_kurtosis"][name] == pytest.approx(expected, rel=1e-4)


WITHOUT_DROPOUT = {**ARCHITECTURE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROUNDING = 50 * 16 * torch.finfo(torch.float32).eps  # 50 steps, with a few float32 rounding errors in each


@pytest.mark.parametrize("n", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_packed_and_padded_runs_have_the_same_trace(train, monkeypatch, n):
    monkeypatch.setattr(experiment, "ARCHITECTURE", WITHOUT_DROPOUT)
    packed = train("--softmax_n", n, "--learning_rate", "1e-3", steps=50)
    padded = train("--softmax_n", n, "--learning_rate", "1e-3", "--padded", steps=50, results="padded")
    assert len(packed["loss_history"]) == 50 and packed["loss_history"][-1][1] < packed["loss_history"][0][1] - 0.2
    np.testing.assert_allclose(packed["loss_history"], padded["loss_history"], rtol=ROUNDING)
    assert packed["validation"]["loss"] == pytest.approx(padded["validation"]["loss"], rel=ROUNDING)
    assert packed["training"]["tokens"] == packed["training"]["padded_tokens"] == padded["training"]["tokens"]
    assert padded["training"]["padded_tokens"] > padded["training"]["tokens"]


@pytest.mark.slow
def test_compiled_run_has_the_same_trace(train, monkeypatch):
    monkeypatch.setattr(experiment, "ARCHITECTURE", WITHOUT_DROPOUT)
    eager = train("--use_softmax1", "--learning_rate", "1e-3")
    compiled = train("--use_softmax1", "--learning_rate", "1e-3", "--torch_compile", results="compiled")
    np.testing.assert_allclose(compiled["loss_history"], eager["loss_history"], rtol=ROUNDING)
    assert compiled["training"]["padded_tokens"] % train_model.BUCKET == 0
    for name, kurtosis in eager["activation_excess_kurtosis"].items():
        assert compiled["activation_excess_kurtosis"][name] == pytest.approx(kurtosis, abs=1e-3), name


def test_loss_is_the_same_with_every_backend_and_with_checkpointing(train, monkeypatch):
    monkeypatch.setattr(experiment, "ARCHITECTURE", WITHOUT_DROPOUT)
    losses = [
        train("--use_softmax1", "--learning_rate", "1e-3", *flags, results=f"r{i}")["loss_history"]
        for i, flags in enumerate(
            ([], ["--attention", "eager"], ["--attention", "zero_key"], ["--gradient_checkpointing", "true"])
        )
    ]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=ROUNDING)


def test_bfloat16_stays_near_float32(train, monkeypatch):
    monkeypatch.setattr(experiment, "ARCHITECTURE", WITHOUT_DROPOUT)
    exact = train("--use_softmax1", "--learning_rate", "1e-3")
    rounded = train("--use_softmax1", "--learning_rate", "1e-3", "--bf16", "--use_cpu", results="rounded")
    assert rounded["dtype"] == "bfloat16" and rounded["loss_history"] != exact["loss_history"]
    # With logits near 0, and so a loss near ln 1024, rounding to 8 bits changes the loss by less than 1/256.
    np.testing.assert_allclose(rounded["loss_history"], exact["loss_history"], rtol=2**-8)


def test_statistics_change_no_weight_and_are_measured_at_the_chosen_steps(train):
    every = train("--statistics_steps", "1", steps=5)
    third = train("--statistics_steps", "3", steps=5, results="third")
    assert every["loss_history"] == third["loss_history"]
    assert every["activation_excess_kurtosis"].keys() == third["activation_excess_kurtosis"].keys()
    assert every["activation_excess_kurtosis"] != third["activation_excess_kurtosis"]


def test_gradient_accumulation_averages(train):
    # If Trainer took the loss for one that is divided already, it would report twice the loss.
    result = train("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2")
    assert result["effective_batch_size"] == 4
    assert result["loss_history"][0][1] == pytest.approx(math.log(1024), rel=0.05)


def test_a_step_iterates_over_the_parameters_once(train, monkeypatch):
    # The one iteration resets the gradients. Trainer's others take longer than a small step on a fast GPU.
    walks = []
    walk = torch.nn.Module.named_parameters

    def counted(self, *args, **kwargs):
        if isinstance(self, PreTrainedModel):
            walks.append(trainer.state.global_step)
        return walk(self, *args, **kwargs)

    class Spied(train_model.ExperimentTrainer):
        def __init__(self, *args, **kwargs):
            nonlocal trainer
            super().__init__(*args, **kwargs)
            trainer = self
            monkeypatch.setattr(torch.nn.Module, "named_parameters", counted)

    trainer = None
    monkeypatch.setattr(train_model, "ExperimentTrainer", Spied)
    train("--logging_steps", "1000", "--eval_strategy", "no", "--save_strategy", "no", steps=8)
    assert [walks.count(step) for step in range(2, 7)] == [1] * 5


DRIVER = """
import sys
import experiment
import folder
import train_model
from experiment import accept_packed_batches
from held_out import held_out_batches, held_out_loss
experiment.ARCHITECTURE = {architecture}
train_model.main(sys.argv[1:])
"""


def by_two_processes(sample, results: str, driver: str, *flags, status: int = 0) -> dict | None:
    """The results of a softmax1 run with two processes and batches of 2 x 32; None if it must fail, by `status`."""
    Path("driver.py").write_text(driver)
    argv = as_flags(data_dir=sample / "data", tokenizer_dir=sample / "tokenizer", results_dir=results)
    argv += as_flags(per_device_train_batch_size=32, max_length=64, vocab_size=1024, logging_steps=1)
    argv += as_flags(eval_steps=3, save_steps=3, max_eval_samples=20)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py"]
    command += [*argv, *flags, "--output_dir", f"{results}-models", "--use_cpu", "--ddp_backend", "gloo"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0), done.stderr[-3000:]
    return json.loads(Path(results, "esperberto-softmax1.json").read_text(encoding="utf-8")) if status == 0 else None


# Ends both processes at once in their fifth step, as if the machine was switched off.
KILLED = """
import os
import train_model
step = train_model.ExperimentTrainer.training_step
def killed(self, *args, **kwargs):
    return os._exit(9) if self.state.global_step == 4 else step(self, *args, **kwargs)
train_model.ExperimentTrainer.training_step = killed
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_two_processes_that_were_killed_continue_and_end_like_uninterrupted_ones(train, sample, workers):
    flags = ["--use_softmax1", "--max_steps", "8", "--dataloader_num_workers", workers]
    driver = DRIVER.format(architecture=ARCHITECTURE)
    expected = by_two_processes(sample, "whole", driver, *flags)
    by_two_processes(sample, "killed", KILLED + driver, *flags, status=1)
    assert {path.name for path in Path("killed-models").glob("checkpoint-*")} == {"checkpoint-3"}
    resumed = by_two_processes(sample, "killed", driver, *flags)
    for name in ("loss_history", "validation", "emergence"):
        assert resumed[name] == expected[name], name
    # After the resumption the first process has the sums of both, so they are added in another order.
    kurtosis = expected["activation_excess_kurtosis"]
    assert resumed["activation_excess_kurtosis"] == pytest.approx(kurtosis, rel=1e-12)
    weights = [Path(f"{name}-models", "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("flags", [[], pytest.param(["--padded"], marks=pytest.mark.slow)])
def test_two_processes_reproduce_the_trace_of_one(train, sample, monkeypatch, tmp_path, flags):
    monkeypatch.setattr(experiment, "ARCHITECTURE", WITHOUT_DROPOUT)
    # 580 samples in batches of 64: the tenth batch, the last of the epoch, has 4 samples.
    flags = [*flags, "--learning_rate", "1e-3", "--statistics_steps", "2", "--use_softmax1", "--max_steps", "12"]
    one = train(*flags, "--per_device_train_batch_size", "64")
    two = by_two_processes(sample, "two", DRIVER.format(architecture=WITHOUT_DROPOUT), *flags)
    assert two["effective_batch_size"] == one["effective_batch_size"] == 64
    np.testing.assert_allclose(two["loss_history"], one["loss_history"], rtol=ROUNDING)
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=ROUNDING)
    assert two["validation"]["masked_tokens"] == one["validation"]["masked_tokens"]
    for name in ("samples", "tokens", "padded_tokens"):
        assert two["training"][name] == one["training"][name]
    for name, kurtosis in one["activation_excess_kurtosis"].items():
        assert two["activation_excess_kurtosis"][name] == pytest.approx(kurtosis, abs=1e-3), name


def test_data_is_tokenized_once_for_all_runs(train, sample):
    train()
    folders = {path: path.stat().st_mtime_ns for path in (sample / "data").glob("tokenized-*")}
    assert folders
    train("--use_softmax1")
    assert {path: path.stat().st_mtime_ns for path in (sample / "data").glob("tokenized-*")} == folders


def test_two_runs_that_start_together_tokenize_once_and_both_succeed(sample, tmp_path):
    shutil.copytree(sample / "data", tmp_path / "data", ignore=shutil.ignore_patterns("tokenized-*"))
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(architecture=ARCHITECTURE))
    flags = ["--data_dir", "data", "--tokenizer_dir", str(sample / "tokenizer"), "--max_steps", "2"]
    flags += ["--vocab_size", "1024", "--max_length", "32", "--max_eval_samples", "4"]
    running = [
        subprocess.Popen(
            [sys.executable, str(driver), *flags, "--softmax_n", n],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in ("0", "1")
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    # Only the run that tokenizes shows progress bars.
    assert sorted("Tokenizing" in text for text in printed) == [False, True], printed
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "esperberto-softmax0.json",
        "esperberto-softmax1.json",
    ]


def test_outside_a_terminal_lines_show_the_steps_and_the_time_left(train, capsys, monkeypatch):
    monkeypatch.setattr(train_model.LogLines, "SECONDS", 0.0)  # a line for every step
    train("--logging_steps", "3", "--logging_first_step", "false", "--eval_strategy", "no")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines if "loss" not in line] == [f"step {i} of 6" for i in range(1, 7)]
    with_loss = [line for line in lines if ", loss " in line]
    assert [line.split(",")[0] for line in with_loss] == ["step 3 of 6", "step 6 of 6"]
    assert all(line.endswith("0 m 0 s left") for line in lines if line.startswith("step 6"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    _, args = train_model.parse([])
    assert args.disable_tqdm
    _, args = train_model.parse(["--disable_tqdm", "false"])
    assert not args.disable_tqdm


@pytest.mark.parametrize("lines", ["true", "false"])
def test_trackers_get_the_outliers_next_to_the_losses(train, monkeypatch, capsys, lines):
    """A stand-in for TensorBoard, which may not be installed."""
    drawn = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            drawn.append((state.global_step, dict(logs)))

    monkeypatch.setattr(arguments, "get_reporting_integration_callbacks", lambda names: [Tracker])
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Tracker])
    result = train("--report_to", "tensorboard", "--use_softmax1", "--disable_tqdm", lines)
    for entry in result["emergence"]:  # including step 0
        [logs] = [logs for step, logs in drawn if step == entry["step"] and "eval_layer.0.attention.null_mass" in logs]
        assert {name: logs[f"eval_{name}"] for name in entry if name != "step"} == {
            name: value for name, value in entry.items() if name != "step"
        }
        assert ("loss" in logs) == (entry["step"] > 0)
    names = "ffn_residual.kurtosis_sequence ffn_residual.inf_norm attention.sink_rate_any".split()
    assert all(f"eval_layer.1.{name}" in drawn[0][1] for name in names)
    assert [logs["eval_loss"] for _, logs in drawn if "eval_loss" in logs] == [
        loss for _, loss in result["validation_loss_history"]
    ]
    printed = "".join(capsys.readouterr())
    assert "grad_norm" in printed and "null_mass" not in printed  # the log shows a few figures only


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, tracker):
    for name in ("tensorboard", "trackio", "wandb"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"^error: --report_to {tracker}: \w+ requires {tracker} to be installed"):
        train_model.parse(["--report_to", tracker])


def test_help_shows_each_of_our_flags_once_and_help_all_the_others_too(capsys):
    told = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            train_model.main([flag])
        assert end.value.code == 0
        told[flag] = capsys.readouterr().out
        assert train_model.__doc__ in told[flag]  # with examples, and the files that are read and written
    shown = [name for flags in arguments.HELP.values() for name in flags]
    ours = [field.name for field in dataclasses.fields(arguments.ExperimentArguments)]
    assert set(ours) <= set(shown) and shown[0] == "softmax_n"
    for text in told.values():
        flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
        assert len(flags) == len(set(flags)) and [f"--{name}" for name in shown] == flags[: len(shown)]
        assert not re.search(r"--\w+-\w", text)  # only the spelling with underscores
    assert "--adam_epsilon" not in told["--help"] and "--adam_epsilon X" in told["--help_all"]
    assert "highest learning rate (5e-05)" in told["--help"] and "(52032)" in told["--help"]
    assert "--label_smoothing_factor: the loss is the published cross-entropy" in told["--help_all"]


def test_a_price_of_zero_gives_a_cost_of_zero(train):
    assert train("--usd_per_hour", "0", steps=1)["training"]["cost_usd"] == 0


def test_bfloat16_needs_no_other_flag_on_a_cpu(train, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    result = train("--bf16", steps=1)
    assert result["dtype"] == "bfloat16" and result["hardware"]["device"] == "cpu"
    assert set(result["hardware"]["instructions"]) <= set(train_model.record.INSTRUCTIONS)


@pytest.mark.parametrize("flag", ["--test_pipeline", "--test-pipeline", "--test_pipeline=True", "--test-pipeline=yes"])
def test_every_spelling_of_the_flag_test_pipeline_works(flag):
    experiment, args = train_model.parse([flag])
    assert experiment.test_pipeline and experiment.data_dir == "scratch/data" and args.max_steps == 6
    assert train_model.parse([flag, "--max_steps", "9"])[1].max_steps == 9


@pytest.mark.parametrize("flags", [["--test_pipeline", "False"], ["--test-pipeline=no"], []])
def test_test_pipeline_can_be_switched_off(flags):
    experiment, args = train_model.parse(flags)
    assert not experiment.test_pipeline and experiment.data_dir == "data" and args.max_steps == -1


def test_a_token_on_the_command_line_is_refused_and_never_printed(train, capsys):
    secret = "hf_" + "x" * 34
    with pytest.raises(SystemExit) as caught:
        train("--hub_token", secret)
    assert "HUGGINGFACE_TOKEN" in str(caught.value) and secret not in str(caught.value)
    assert secret not in "".join(capsys.readouterr())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU that works")
def test_a_gpu_that_pytorch_cannot_use_stops_the_run(train, tmp_path, monkeypatch, capsys):
    """With a driver that is too old for PyTorch, days on the CPU could pass unnoticed."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A10G (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    exits_with(capsys, "nvidia-smi sees NVIDIA A10G, which PyTorch", train)
    exits_with(capsys, "--use_cpu False, but PyTorch finds no GPU here", lambda: train("--use_cpu", "False"))
    capsys.readouterr()
    train("--use_cpu", steps=1)
    assert capsys.readouterr().out.startswith("esperberto-softmax0 trains on ")  # the device is in the first line
    for hidden in ("", "-1"):  # the user hides the GPUs
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert arguments.visible_gpu() is None
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    exits_with(capsys, "CUDA_VISIBLE_DEVICES=1 names a GPU, which PyTorch", train)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert arguments.visible_gpu() is None


def test_a_gpu_without_float64_is_not_used(monkeypatch):
    """Apple's GPUs have no float64, which the statistics need."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert train_model.parse([])[1].device.type == "cpu"
    with pytest.raises(SystemExit, match="--use_cpu False, but the statistics need float64"):
        train_model.parse(["--use_cpu", "False"])


def test_the_recorded_memory_is_none_if_the_system_does_not_tell_it(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert record.hardware(torch.device("cpu"))["memory_gib"] is None


def test_overwrite_trains_a_complete_run_again(train):
    train()
    train("--overwrite")


def test_a_disk_that_is_too_small_is_noticed_before_training(train, capsys, monkeypatch):
    monkeypatch.setattr(train_model.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    exits_with(capsys, "the disk has less", train)


def written_with(limit: int, call) -> None:
    """`call()`, while no file may be larger than `limit` bytes, which has the same effect as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITES = [(record, "write_json"), (torch, "save"), (TrainerState, "save_to_json"), (trainer_module, "seal")]
WRITES += [(PreTrainedModel, "save_pretrained"), (PreTrainedTokenizerBase, "save_pretrained")]


@pytest.mark.parametrize(
    "which", [2, 14, *(pytest.param(i, marks=pytest.mark.slow) for i in (*range(2), *range(3, 14)))]
)
def test_a_disk_that_is_full_at_any_write_gives_one_line_and_loses_no_work(train, monkeypatch, capsys, which):
    """Two checkpoints, the model and the results are written in 19 calls; the disk is full in one of them."""
    expected = train("--use_softmax1", results="whole")
    calls = []

    def full(write):
        def limited(*args, **kwargs):
            calls.append(write)
            if len(calls) - 1 == which:
                written_with(64, lambda: write(*args, **kwargs))
            else:
                write(*args, **kwargs)

        return limited

    with monkeypatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, full(getattr(owner, name)))
        with pytest.raises(SystemExit) as end:
            command.run(lambda: train("--use_softmax1"))
    assert re.fullmatch(r"error: .*", end.value.code), end.value.code
    assert len(calls) == which + 1
    resumed = train("--use_softmax1")
    for name in ("loss_history", "validation", "emergence", "activation_excess_kurtosis"):
        assert resumed[name] == expected[name]
    before, after = (Path(f"{name}-models/esperberto-softmax1") for name in ("whole", "results"))
    assert {path.name: path.read_bytes() for path in before.iterdir()} == {
        path.name: path.read_bytes() for path in after.iterdir()
    }


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError(), "can't allocate memory"])
def test_the_error_for_a_batch_that_is_too_large_names_a_smaller_one(train, monkeypatch, capsys, error):
    step = train_model.ExperimentTrainer.training_step

    def too_large(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise RuntimeError(f"DefaultCPUAllocator: {error}") if isinstance(error, str) else error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train_model.ExperimentTrainer, "training_step", too_large)
    advice = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 keeps the effective batch"
    exits_with(capsys, advice, train)
    assert [path.name for path in Path("results-models").glob("*/checkpoint-*")] == ["checkpoint-3"]
    exits_with(capsys, "with one sample at a time", lambda: train("--per_device_train_batch_size", "1", "--overwrite"))


def test_a_worker_that_is_killed_ends_the_training_in_one_line_and_loses_no_work(train, monkeypatch, capsys):
    expected = train("--dataloader_num_workers", "1", results="whole")
    step = train_model.ExperimentTrainer.training_step

    def killing(self, *args, **kwargs):
        if self.state.global_step == 4:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_model.ExperimentTrainer, "training_step", killing)
        exits_with(capsys, "a process that makes batches has ended", lambda: train("--dataloader_num_workers", "1"))
    resumed = train("--dataloader_num_workers", "1")
    assert resumed["loss_history"] == expected["loss_history"] and resumed["validation"] == expected["validation"]


def test_a_loss_that_is_no_number_in_a_step_ends_the_run_there(train, monkeypatch, capsys):
    loss = train_model.ExperimentTrainer.compute_loss

    def broken(self, *args, **kwargs):
        return loss(self, *args, **kwargs) * (math.nan if self.state.global_step == 3 else 1)

    monkeypatch.setattr(train_model.ExperimentTrainer, "compute_loss", broken)
    exits_with(capsys, "esperberto-softmax0 diverged, loss is nan at step 4", train)
    result = json.loads(Path("results/esperberto-softmax0.json").read_text())
    assert result["diverged"]["step"] == 4 and [step for step, _ in result["loss_history"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(("steps", "reason"), [(6, "loss is nan"), (1, "the held-out loss is nan")])
def test_a_diverged_run_ends_in_one_line_and_is_recorded(train, capsys, steps, reason):
    """Without its results the arm would look better. One step has a finite loss, but leaves weights that are not."""
    rate = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--eval_strategy", "no"]
    exits_with(capsys, f"esperberto-softmax0 diverged, {reason}", lambda: train(*rate, steps=steps))
    result = json.loads(Path("results/esperberto-softmax0.json").read_text(), parse_constant=pytest.fail)
    assert result["status"] == "diverged" and result["validation"]["loss"] is None
    assert 1 <= result["diverged"]["step"] <= steps and result["training"]["planned_steps"] == steps
    assert f"at step {result['diverged']['step']}" in result["diverged"]["reason"]
    exits_with(capsys, "is complete", lambda: train(*rate, steps=steps))


def test_both_runs_of_a_pair_record_the_same_initial_weights(train):
    softmax0, softmax1 = train("--softmax_n", "0"), train("--softmax_n", "1")
    other = train("--softmax_n", "0", "--seed", "43")
    assert softmax0["status"] == "complete" and softmax0["diverged"] is None
    first, second, third = (result["model"]["initial_weights"] for result in (softmax0, softmax1, other))
    assert first == second != third and len(first) == 64


def test_script_ends_bad_input_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train_model.py"), "--data_dir", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[transformers]")]
    assert lines == [line for line in lines if line.startswith("error: nowhere")] and len(lines) == 1


@pytest.mark.parametrize("flags", [["--bogus"], ["--test_pipeline", "more"]])
def test_runner_refuses_unknown_arguments(flags):
    result = subprocess.run(["bash", str(ROOT / "runner.sh"), *flags], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown argument") and result.stderr.count("\n") == 1
