"""Train one arm of the experiment: RoBERTa with softmax_n attention, on data/ with tokenizer/, from random weights.

    python train_model.py                       softmax, the published settings
    python train_model.py --use_softmax1        softmax1, the same batches, masks and initial weights
    python train_model.py --softmax_n 0.5 --seed 43
    python train_model.py --config_overrides num_hidden_layers=4,hidden_size=256,num_attention_heads=4
    python train_model.py --test_pipeline       the whole path in a minute or two, on the embedded sample, in scratch/
    python train_model.py --push_to_hub         and push model, tokenizer and card in the end (see hub.py)

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py). Writes models/<run>/ (model and tokenizer) and
results/<run>.json (record.py says with what). An interrupted run goes on from its last checkpoint when the same command
is given again. Every flag of transformers' TrainingArguments works; the defaults are the published experiment's.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForMaskedLM,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import arms
import hub
import record
from arms import prepared
from controls import CONTROLS, GATE
from corpus import load_data, load_tokenizer, tokenized
from folder import locked, refuse_unwritable, sole
from held_out import (
    HELD_OUT_SEED,
    evenly_spread,
    held_out_batches,
    held_out_loss,
    losses_without_context,
    padded_batches,
    perplexity,
)
from outliers import ActivationKurtosis, Emergence, weight_excess_kurtosis
from packing import MaskedLMCollator, on_device, summed_loss
from runs import read_results
from softmax1 import BACKENDS, attention_backend, checked_softmax_n, softmax_n_attention_varlen
from tables import duration

EFFECTIVE_BATCH_SIZE = 16  # of the published run, whatever the number of processes

# Tokens to a multiple of which a packed batch is filled up for a compiled model: each new shape costs a compilation.
BUCKET = 128

# Outliers are watched growing on so many texts of the held-out split: evenly spread over it and unmasked, as the texts
# of the analysis are. Before the first update, and whenever the loss is logged.
EMERGENCE_TEXTS = 64
EMERGENCE_BATCH = 16

# USD an hour of the machine that the GPU was rented in: AWS g5.2xlarge, as the published run paid it.
USD_PER_HOUR = {"NVIDIA A10G": 1.212}

# Flags of TrainingArguments that would change nothing here, or break the comparison, with the reason. At their defaults
# they are nobody's concern.
REFUSED = {
    "label_smoothing_factor": "the loss is the published cross-entropy",
    "group_by_length": "the samples come in the published, shuffled order",
    "train_sampling_strategy": "the samples come in the published, shuffled order",
    "load_best_model_at_end": "the last model is the one that is compared",
    "auto_find_batch_size": "the batch is a setting of the experiment",
    "fsdp": "the model fits one device; several processes share the batch (torchrun)",
    "deepspeed": "the model fits one device; several processes share the batch (torchrun)",
    "torch_empty_cache_steps": "it is not looked at",
    "dataloader_persistent_workers": "it is not looked at",
}

# What --test_pipeline changes; flags on the command line still win.
TEST_PIPELINE = {
    "data_dir": "scratch/data",
    "tokenizer_dir": "scratch/tokenizer",
    "output_dir": "scratch/models/<run>",
    "results_dir": "scratch/results",
    "overwrite": True,
    "max_length": 64,
    "max_eval_samples": 32,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 2,
    "eval_steps": 3,
    "save_steps": 3,
}


@dataclass
class ExperimentArguments:
    """What the experiment varies, and where its files are."""

    softmax_n: float | None = field(default=None, metadata={"help": "n of the attention, >= 0 (default 0: softmax)"})
    use_softmax1: bool = field(default=False, metadata={"help": "short for --softmax_n 1"})
    control: str | None = field(
        default=None,
        metadata={"choices": list(CONTROLS), "help": "a published remedy in place of softmax_n (see controls.py)"},
    )
    test_pipeline: bool = field(default=False, metadata={"help": "tiny numbers, embedded sample, files in scratch/"})
    data_dir: str = field(default="data", metadata={"help": "dataset of build_dataset.py"})
    tokenizer_dir: str = field(default="tokenizer", metadata={"help": "tokenizer of train_tokenizer.py"})
    results_dir: str = field(default="results", metadata={"help": "where <run>.json goes"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a run that is complete, or one with other settings"}
    )
    padded: bool = field(
        default=False,
        metadata={"help": "the published arithmetic: padded batches, logits of every token; same loss, much slower"},
    )
    attention: str = field(
        default="auto",
        metadata={"choices": list(BACKENDS), "help": "the kernel of softmax_n attention (auto: the fastest there is)"},
    )
    statistics_steps: int = field(
        default=10, metadata={"help": "steps between measurements of the activations' kurtosis (published: 1)"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of a sample at most; the rest is cut off"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are masked (80/10/10)"})
    vocab_size: int = field(default=52_032, metadata={"help": "rows of the embedding; >= the tokenizer's entries"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "N held-out samples, evenly spread (default: all)"}
    )
    config_overrides: str = field(
        default="", metadata={"help": 'another size: "num_hidden_layers=4,hidden_size=256,..." (of RobertaConfig)'}
    )
    usd_per_hour: float | None = field(default=None, metadata={"help": "price of this machine, for the cost"})

    def __post_init__(self):
        if self.use_softmax1 and self.softmax_n not in (None, 1):
            raise ValueError(f"--use_softmax1 means --softmax_n 1, which contradicts --softmax_n {self.softmax_n:g}")
        self.softmax_n = checked_softmax_n(1.0 if self.use_softmax1 else self.softmax_n or 0.0)
        if self.control and self.softmax_n:
            raise ValueError(f"--control {self.control} has an attention of its own, without --softmax_n")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability:g}")
        overrides = arms.config_overrides(self.config_overrides)
        self.config_overrides = ",".join(f"{key}={value}" for key, value in overrides.items())  # one way to write it
        positions = (arms.ARCHITECTURE | overrides)["max_position_embeddings"] - 2
        if not 3 <= self.max_length <= positions:
            raise ValueError(f"--max_length must lie between 3 and the model's {positions} positions")
        if self.statistics_steps < 1:
            raise ValueError("--statistics_steps must be at least 1")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError("--max_eval_samples must be at least 1")


@dataclass
class PublishedTrainingArguments(TrainingArguments):
    """TrainingArguments with the published settings as defaults.

    What is not named here is transformers' own default, which the published run used too: AdamW with lr 5e-5, betas
    (0.9, 0.999), eps 1e-8 and no weight decay, linear decay without warm-up, clipping at 1.0, float32, seed 42.
    """

    output_dir: str = field(default="models/<run>", metadata={"help": "where the model goes"})
    num_train_epochs: float = field(default=1.0)
    # The published run asked for 128, ran out of memory and was halved to 16. Ours is 16 on purpose, divided over the
    # processes and accumulation steps if there are several.
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "default: 16 over all processes"})
    per_device_eval_batch_size: int = field(default=16)
    logging_steps: float = field(default=1_000)
    logging_first_step: bool = field(default=True)
    logging_nan_inf_filter: bool = field(default=False)  # a NaN is to be seen, not averaged away
    eval_strategy: str = field(default="steps")
    eval_steps: float | None = field(default=10_000)
    save_steps: float = field(default=10_000)
    save_total_limit: int | None = field(default=1)
    report_to: str | None = field(default="none")
    ddp_find_unused_parameters: bool | None = field(default=False)  # there are none
    # A GPU takes a batch in less time than it takes to mask and pack one.
    dataloader_num_workers: int = field(default_factory=lambda: 4 if torch.cuda.is_available() else 0)

    def __post_init__(self):
        chosen = self.per_device_train_batch_size
        self.per_device_train_batch_size = chosen or EFFECTIVE_BATCH_SIZE
        super().__post_init__()
        shares = self.world_size * self.gradient_accumulation_steps
        if chosen is None:
            if EFFECTIVE_BATCH_SIZE % shares:
                raise ValueError(
                    f"the effective batch of {EFFECTIVE_BATCH_SIZE} does not divide into {self.world_size} processes x "
                    f"{self.gradient_accumulation_steps} accumulation steps: give --per_device_train_batch_size"
                )
            self.per_device_train_batch_size = EFFECTIVE_BATCH_SIZE // shares


# ------------------------------------------------------------------------------------------------------- the training


class ExperimentTrainer(Trainer):
    """Trainer with our batches, loss and held-out loss, that counts tokens and gathers the published statistics.

    Every process makes the whole batch and keeps its share: neither masks nor loss depend on how many there are.
    """

    def __init__(
        self, *args, held_out: list[dict], statistics: ActivationKurtosis, statistics_steps: int, packed: bool, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self.statistics = statistics
        self.statistics_steps = statistics_steps
        self.packed = packed
        # Of all processes; but padded tokens are those of this one, until `counts` adds them up.
        self.samples = self.tokens = self.padded_tokens = 0

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size * self.args.world_size,
            sampler=RandomSampler(self.train_dataset),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=self.args.dataloader_drop_last,
        )
        # accelerate's seeded shuffling, which can resume, without its division among the processes.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = on_device(inputs, self.args.device)
        self.samples += inputs["samples"]
        self.tokens += inputs["tokens"]
        self.padded_tokens += inputs["input_ids"].numel()
        if not model.training:  # Trainer would walk over all modules at every step to say so again
            model.train()
        measured = contextlib.nullcontext()
        if self.state.global_step % self.statistics_steps == 0:
            # A compiled model has no place for hooks; what it was compiled from computes the same.
            model = getattr(model, "_orig_mod", model)
            self.statistics.packed = inputs if self.packed else None
            measured = self.statistics
        with measured:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model):
        # Trainer's own looks the parameters up in the model, walking over all modules twice a step.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, _ = summed_loss(model, inputs)
        # The gradients of the processes will be averaged, so this is the mean over the whole batch's masked tokens.
        return loss * (self.args.world_size / inputs["masked_tokens"])

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's estimate walks over all parameters at every step, to count what is not computed here

    def _save_checkpoint(self, model, trial):
        # Trainer deletes the older checkpoints before ours is whole: that is left to `Bookkeeping.on_save`.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        loss, _ = held_out_loss(self.model, self.held_out, progress=not self.args.disable_tqdm)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def counts(self) -> dict[str, int]:
        """What the run has seen so far, over all processes. Every process has to call it."""
        padded_tokens = self.accelerator.reduce(torch.tensor(self.padded_tokens, device=self.args.device), "sum")
        return {"samples": self.samples, "tokens": self.tokens, "padded_tokens": int(padded_tokens)}


class Diverged(Exception):
    """The loss is no finite number any more: the run ends here, and that is its result."""

    def __init__(self, name: str, value: float, step: int):
        super().__init__(f"{name} is {value} at step {step}")
        self.step = step


class Bookkeeping(TrainerCallback):
    """Keeps in every checkpoint what the run's record needs, and stops a run whose loss is no number any more.

    Before the first update and at logging steps it also looks how far outliers have grown.
    """

    def __init__(self, settings: dict, emergence: Emergence):
        self.settings = settings
        self.emergence = emergence
        self.emerged: list[dict[str, float]] = []
        self.trainer: ExperimentTrainer | None = None
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.window: tuple[int, list[float]] | None = None  # step of the last log, losses since then by process

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all its sessions."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        if state.global_step == 0:
            self.emerged = [{"step": 0, **self.emergence(self.trainer.model)}]
        if self.window is not None:
            trainer = self.trainer
            trainer._globalstep_last_logged, losses = self.window
            trainer._tr_loss += losses[args.process_index]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:  # so that the last, shorter window of the loss is logged too
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        trainer = self.trainer
        progress = {
            "settings": self.settings,
            "seconds": self.seconds,
            "counts": trainer.counts(),
            "activation_kurtosis": trainer.statistics.state(),
            "emergence": self.emerged,
            # Trainer forgets it, and would log a mean over the steps after a resumption alone.
            "loss_window": [trainer._globalstep_last_logged, trainer.accelerator.gather(trainer._tr_loss).tolist()],
        }
        if state.is_world_process_zero:
            # What makes the checkpoint whole. Only now may older ones go.
            record.write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "progress.json", progress)
            if args.save_total_limit:
                for old in checkpoints(args.output_dir)[args.save_total_limit :]:
                    shutil.rmtree(old)

    def restore(self, checkpoint: str) -> None:
        """Take up the counts of an earlier session. Exits when that session had other settings."""
        progress = json.loads((Path(checkpoint) / "progress.json").read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(self.settings)).items():
            if progress["settings"].get(name) != value:
                before = progress["settings"].get(name)
                sys.exit(
                    f"error: {checkpoint} was made with {name} = {before}, not {value}: "
                    "give the same settings to go on with it, or --overwrite to start again"
                )
        self.seconds_before = progress["seconds"]
        trainer, counts = self.trainer, progress["counts"]
        trainer.samples, trainer.tokens = counts["samples"], counts["tokens"]
        if trainer.is_world_process_zero():  # the sums over all processes, which are to count once
            trainer.padded_tokens = counts["padded_tokens"]
            trainer.statistics.load_state(progress["activation_kurtosis"])
        self.emerged = progress["emergence"]
        last_logged, losses = progress["loss_window"]
        self.window = last_logged, np.atleast_1d(losses).tolist()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise Diverged(name, logs[name], state.global_step)
        if "loss" in (logs or {}):
            self.emerged.append({"step": state.global_step, **self.emergence(self.trainer.model)})


class StopWhenAsked(TrainerCallback):
    """Writes a checkpoint before Ctrl-C or SIGTERM ends the training, as when a rented machine is taken away.

    A second signal ends at once. Of several processes none may leave alone, so there the signals stay what they are.
    """

    def __init__(self):
        self.asked: int | None = None
        self.before: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame) -> None:
        self.restore()
        self.asked = number
        print("Asked to stop: writing a checkpoint after this step (once more ends at once)", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class LogLines(TrainerCallback):
    """Where there is no terminal: a line at every logging step and at least every minute, with the time that is left.

    A progress bar is redrawn several times a second, which makes a log of many megabytes. train_runs.py reads these.
    """

    SECONDS = 60.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.started = state.global_step, time.monotonic()
        self.told = self.started

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.told >= self.SECONDS:
            self.tell(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = [name for name in ("loss", "eval_loss", "grad_norm", "learning_rate") if name in (logs or {})]
        if names:
            self.tell(state, "".join(f", {name} {logs[name]:.4g}" for name in names))

    def tell(self, state, what: str = "") -> None:
        self.told = time.monotonic()
        if state.is_world_process_zero and state.global_step:
            steps = state.global_step - self.first_step
            left = (self.told - self.started) / steps * (state.max_steps - state.global_step) if steps else None
            left = "" if left is None else f", {duration(left)} left"
            print(f"step {state.global_step:,} of {state.max_steps:,}{what}{left}", flush=True)


def shaping_settings(
    experiment: ExperimentArguments, args: TrainingArguments, data_sha: str, tokenizer_sha: str
) -> dict:
    """The settings that shape the weights: a run may only be resumed with the same ones."""
    names = (
        "seed data_seed per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
        "learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "optim bf16 fp16"
    ).split()
    return {
        "softmax_n": experiment.softmax_n,
        "control": experiment.control,
        "dataset": data_sha,
        "tokenizer": tokenizer_sha,
        "max_length": experiment.max_length,
        "mlm_probability": experiment.mlm_probability,
        "vocab_size": experiment.vocab_size,
        "config_overrides": experiment.config_overrides,
        "padded": experiment.padded,
        "statistics_steps": experiment.statistics_steps,
        "processes": args.world_size,
        **{name: getattr(args, name) for name in names},
    }


def refuse_other_settings(results_path: Path, experiment: ExperimentArguments, args: TrainingArguments) -> None:
    """Exit with one line when a finished run was not trained as is wanted now, and so belongs to another experiment."""
    results = read_results(results_path)
    if "settings" not in results:
        return
    _, manifest = load_data(experiment.data_dir)
    tokenizer_sha = record.sha256(Path(experiment.tokenizer_dir) / "tokenizer.json")
    asked = shaping_settings(experiment, args, manifest["splits"]["train"]["sha256"], tokenizer_sha)
    asked = {name: value for name, value in {**asked, **args.to_dict()}.items() if name in asked}  # no enumerations
    had = {
        **results["settings"],
        "dataset": results["dataset"]["sha256"],
        "tokenizer": results["tokenizer"]["sha256"],
        "processes": asked["processes"],  # their number changes no figure
    }
    for name, value in asked.items():
        if name in had and had[name] != value:
            sys.exit(
                f"error: {results_path} is there, of a run with {name} = {had[name]!r}, not {value!r}: move the "
                "results and models of the other experiment away, or give the settings that they were made with"
            )


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, read once in full to be sure that it can be; None where there is none.

    Newer ones that are not whole are deleted, with a line each: what was interrupted while it was written, and what is
    damaged. Exits when the only one that was written to its end is damaged, since all its work would be lost unseen.
    """
    useless = []
    for checkpoint in checkpoints(folder):
        if not (checkpoint / "progress.json").exists():  # written last of all
            useless.append((checkpoint, "was interrupted while it was written"))
            continue
        try:
            (checkpoint / "progress.json").read_text(encoding="utf-8")
            AutoModelForMaskedLM.from_pretrained(checkpoint)
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        except Exception as error:  # half-written archives fail in as many ways as there are formats
            useless.append((checkpoint, f"is damaged ({record.one_line(error)})"))
            continue
        break
    else:
        checkpoint = None
    if checkpoint is None and (damaged := [said for said in useless if "damaged" in said[1]]):
        sys.exit(f"error: {damaged[0][0]} {damaged[0][1]}: delete that folder and start again")
    for path, why in useless:
        print(f"{path} {why}: deleted")
        shutil.rmtree(path)
    return None if checkpoint is None else str(checkpoint)


# -------------------------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[ExperimentArguments, PublishedTrainingArguments]:
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        (ExperimentArguments, PublishedTrainingArguments), description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.set_defaults(use_cpu=None)
    known = parser.parse_known_args(argv)[0]
    # Trainer refuses bfloat16 on a CPU unless it is told that the CPU is meant.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), disable_tqdm=not sys.stderr.isatty())
    if known.test_pipeline:  # as argparse reads it, in whatever spelling
        parser.set_defaults(**TEST_PIPELINE)
    try:
        experiment, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # how TrainingArguments refuses settings that this machine cannot run
        sys.exit(f"error: {record.one_line(error)}")
    if args.hub_token is not None:  # would also be pickled into training_args.bin beside the model
        sys.exit("error: a token on the command line is read by others: put HUGGINGFACE_TOKEN into .env instead")
    if args.hub_model_id is not None:
        sys.exit("error: --hub_model_id is not for this script: a model goes to <HUGGINGFACE_USER>/<run>")
    check_arguments(args)
    if torch.accelerator.is_available() or known.use_cpu:
        pass
    elif known.use_cpu is not None:
        sys.exit("error: --use_cpu False, but PyTorch finds no GPU here")
    elif gpu := visible_gpu():
        sys.exit(
            f"error: nvidia-smi sees {gpu}, which PyTorch {torch.__version__} cannot use: install a PyTorch for its "
            "CUDA driver, or give --use_cpu to train on the CPU"
        )
    if unknown:
        # The flag alone: its value may be a secret that belonged to another flag.
        sys.exit(f"error: unknown argument: {unknown[0].split('=')[0]} (see python train_model.py --help)")
    return experiment, args


def check_arguments(args: PublishedTrainingArguments) -> None:
    """Exit with one line for a number that no training can have, and for a flag that would change nothing."""
    least = {
        "seed": 0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        "adam_beta1": 0,
        "adam_beta2": 0,
        "adam_epsilon": 0,
        "max_grad_norm": 0,
        "warmup_steps": 0,
    }
    for name, lowest in least.items():
        if not lowest <= (value := getattr(args, name)) < math.inf:  # NaN is not either
            sys.exit(f"error: --{name} must be a number from {lowest} on, got {value:g}")
    if args.seed >= 1 << 32:
        sys.exit(f"error: --seed must be below 2**32, which numpy takes, got {args.seed}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        sys.exit(f"error: --num_train_epochs must be above 0, got {args.num_train_epochs:g}")
    if args.save_strategy == "best":
        sys.exit("error: --save_strategy best: the last model is the one that is compared")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, why in REFUSED.items():
        if name in defaults and (value := getattr(args, name)) != defaults[name] and value:
            sys.exit(f"error: --{name} is not for this script: {why}")


def visible_gpu() -> str | None:
    """The first GPU that nvidia-smi lists; None without one, or where CUDA_VISIBLE_DEVICES hides all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or not shutil.which("nvidia-smi"):
        return None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^GPU 0: (.*?)(?: \(|$)", listed, re.MULTILINE)
    return found and found[1]


def check_attention(backend: str, args: TrainingArguments) -> None:
    """Exit with one line when the backend that is forced cannot attend as training will."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    token = torch.zeros(1, 1, 8, device=args.device, dtype=half)
    bounds = torch.tensor([0, 1], device=args.device, dtype=torch.int32)
    try:
        softmax_n_attention_varlen(token, token, token, bounds, 1, dropout_p=0.1)
    except ValueError as error:
        sys.exit(f"error: --attention {backend}: {record.one_line(error)}")


def mean_over_steps(loss_history: list[tuple[int, float]]) -> float:
    """Mean loss of the whole run, as published. Each entry is the mean over the steps since the one before it.

    Trainer's own figure forgets the steps before a resumption.
    """
    steps = np.diff([0, *(step for step, _ in loss_history)])
    return float(np.average([loss for _, loss in loss_history], weights=steps))


def saved_loss(trainer: ExperimentTrainer, held_out: list[dict], experiment: ExperimentArguments) -> tuple[float, int]:
    """Held-out loss of the model that was saved, in float32 whatever it was trained in, and its masked tokens.

    Exits with one line where the saved model is not the trained one.
    """
    args, trained = trainer.args, trainer.model.state_dict()
    reloaded = prepared(AutoModelForMaskedLM.from_pretrained(args.output_dir).to(trainer.model.device))
    if (
        type(reloaded) is not type(trainer.model)
        or reloaded.config.softmax_n != experiment.softmax_n
        or not all(
            torch.equal(trained[name].nan_to_num(), tensor.nan_to_num())
            for name, tensor in reloaded.state_dict().items()
        )
    ):
        sys.exit(f"error: the model in {args.output_dir} is not the one just trained: look at the disk, train again")
    return held_out_loss(reloaded, held_out, progress=not args.disable_tqdm)


def emergence_texts(validation: datasets.Dataset) -> list[list[int]]:
    """Token ids of EMERGENCE_TEXTS samples, evenly spread over the split, because its sources lie one behind the
    other."""
    return validation[evenly_spread(len(validation), EMERGENCE_TEXTS)]["input_ids"]


def build_test_inputs(data_dir: str, tokenizer_dir: str) -> None:
    """A dataset of the embedded sample and a small tokenizer, for --test_pipeline on a fresh clone."""
    here = Path(__file__).parent
    for script, folder, flags in (
        ("build_dataset.py", data_dir, ["--sample", "--validation_fraction", "0.1"]),
        ("train_tokenizer.py", tokenizer_dir, ["--data_dir", data_dir, "--vocab_size", "2048"]),
    ):
        with locked(folder):  # of several runs that start together, one builds it
            if not Path(folder).exists():
                command = [sys.executable, str(here / script), "--output_dir", folder, *flags]
                if (status := subprocess.run(command).returncode) != 0:
                    sys.exit(status)


def train(experiment: ExperimentArguments, args: PublishedTrainingArguments, command: list[str]) -> None:
    """Train one arm, save it, and write down what the run was and measured. `command` is what it was asked with."""
    transformers.logging.set_verbosity_warning()
    datasets.logging.set_verbosity_warning()
    if args.disable_tqdm:
        transformers.logging.disable_progress_bar()  # that of writing and reading the weights
    run = arms.run_name(experiment.softmax_n, args.seed, experiment.control)
    args.output_dir = args.output_dir.replace("<run>", run)
    args.run_name = run
    results_path = Path(experiment.results_dir) / f"{run}.json"
    if results_path.exists() and not experiment.overwrite:
        sys.exit(
            f"error: {run} is complete ({results_path} is there): move it away, or pass --overwrite to train again"
        )
    check_attention(experiment.attention, args)
    if args.n_gpu > 1:
        sys.exit(f"error: {args.n_gpu} GPUs are visible but one process drives one: set CUDA_VISIBLE_DEVICES=0")
    # Pushing is the last thing done here. Trainer would push during training, with transformers' own card.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    if push_to_hub and args.process_index == 0:
        hub.check()
    if args.process_index == 0:
        refuse_unwritable(args.output_dir)
    with sole(args.output_dir) if args.process_index == 0 else contextlib.nullcontext():
        train_alone(experiment, args, command, results_path, push_to_hub)


def train_alone(
    experiment: ExperimentArguments,
    args: PublishedTrainingArguments,
    command: list[str],
    results_path: Path,
    push_to_hub: bool,
) -> None:
    """Train where nobody else trains the same run."""
    run = args.run_name
    with args.main_process_first(desc="preparing the data"):
        if experiment.test_pipeline:
            build_test_inputs(experiment.data_dir, experiment.tokenizer_dir)
        data, manifest = load_data(experiment.data_dir)
        tokenizer = load_tokenizer(experiment.tokenizer_dir, experiment.vocab_size)
        data_sha = manifest["splits"]["train"]["sha256"]
        tokenizer_sha = record.sha256(Path(experiment.tokenizer_dir) / "tokenizer.json")
        folder = Path(experiment.data_dir) / f"tokenized-{data_sha[:8]}-{tokenizer_sha[:8]}-{experiment.max_length}"
        data = tokenized(data, folder, tokenizer, experiment.max_length)
    validation = data["validation"]
    if experiment.max_eval_samples is not None:
        validation = validation.select(evenly_spread(len(validation), experiment.max_eval_samples))

    overrides = arms.config_overrides(experiment.config_overrides)
    model = arms.build_model(
        experiment.softmax_n, experiment.vocab_size, tokenizer, args.seed, overrides, experiment.control
    )
    # Says that both arms of a pair started from the same point; a control's gates are what it has beyond the other.
    initial_weights = record.weights_sha256(model, leave_out=GATE)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if GATE in name)
    refuse_unwritable(experiment.results_dir)
    # A checkpoint holds the weights and two moments; the old one goes only when the new one is whole. Then the model.
    needed = parameters * 4 * (3 + 3 + 1)
    if shutil.disk_usage(args.output_dir).free < needed:
        sys.exit(
            f"error: {args.output_dir} needs {needed / 1e9:.1f} GB for checkpoints and model, but the disk has less"
        )

    if experiment.overwrite and args.process_index == 0:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and not experiment.overwrite:
        with args.main_process_first(desc="looking for checkpoints"):  # the others find what is left of them
            checkpoint = last_checkpoint(args.output_dir)

    masking = {"tokenizer": tokenizer, "mlm_probability": experiment.mlm_probability}
    held_out = held_out_batches(
        validation, MaskedLMCollator(**masking, seed=HELD_OUT_SEED), args.per_device_eval_batch_size
    )
    collator = MaskedLMCollator(
        **masking,
        seed=args.seed,
        packed=not experiment.padded,
        bucket=BUCKET if args.torch_compile else 1,
        process=args.process_index,
        processes=args.world_size,
    )
    settings = shaping_settings(experiment, args, data_sha, tokenizer_sha)
    watched = emergence_texts(data["validation"])
    emergence = Emergence(padded_batches(tokenizer, watched, EMERGENCE_BATCH), tokenizer)
    bookkeeping = Bookkeeping(settings, emergence)
    # Trainer takes the model's **kwargs for the wish to be told the number of labels, and would count them every step.
    model.accepts_loss_kwargs = False
    trainer = ExperimentTrainer(
        model=prepared(model),
        args=args,
        train_dataset=data["train"],
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[bookkeeping],
        held_out=held_out,
        statistics=ActivationKurtosis(model),
        statistics_steps=experiment.statistics_steps,
        packed=not experiment.padded,
    )
    bookkeeping.trainer = trainer
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    first = trainer.is_world_process_zero()
    if checkpoint is not None:
        bookkeeping.restore(checkpoint)
    effective_batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if first:
        if checkpoint is not None:
            print(f"Going on from {checkpoint}")
        print(
            f"{run} on {record.hardware(args.device)['name']} ({args.device}): {parameters:,} parameters, "
            f"{len(data['train']):,} samples, "
            f"effective batch {effective_batch_size}, "
            f"{len(tokenizer):,} of {experiment.vocab_size:,} vocabulary rows in use"
        )

    stop = StopWhenAsked()
    trainer.add_callback(stop)
    diverged = None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        diverged = error
    finally:
        stop.restore()
    if stop.asked is not None and trainer.state.global_step < trainer.state.max_steps:
        print(f"{run} stopped at step {trainer.state.global_step:,}: the same command goes on from there")
        sys.exit(128 + stop.asked)
    seconds = bookkeeping.seconds

    unigram, context_free = losses_without_context(data["train"], held_out, tokenizer, experiment.vocab_size)
    without_context = {"unigram_loss": unigram, "context_free_loss": context_free, "samples": len(validation)}
    measured = {"validation": {"loss": None, "perplexity": None, "masked_tokens": 0, **without_context}}
    measured |= {"weight_excess_kurtosis": {}, "activation_excess_kurtosis": {}}
    counts = trainer.counts()
    if diverged is None:
        trainer.save_model()  # first of all: nothing below may cost the trained model
        args.distributed_state.wait_for_everyone()
        loss, masked_tokens = saved_loss(trainer, held_out, experiment)
        if not math.isfinite(loss):
            diverged = Diverged("the held-out loss", loss, trainer.state.global_step)
        measured = {
            "validation": {
                "loss": loss,
                "perplexity": perplexity(loss),
                "masked_tokens": masked_tokens,
                **without_context,
            },
            "weight_excess_kurtosis": weight_excess_kurtosis(model),
            "activation_excess_kurtosis": trainer.statistics.result(),
        }
    if torch.distributed.is_initialized():  # nothing is exchanged from here on; leaving it open can abort an exit
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not first:
        sys.exit(0 if diverged is None else 1)

    step = trainer.state.global_step
    history = trainer.state.log_history
    loss_history = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation_history = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if (loss := measured["validation"]["loss"]) is not None:
        validation_history[step] = loss
    hardware = record.hardware(model.device)
    usd_per_hour = experiment.usd_per_hour or USD_PER_HOUR.get(hardware["name"])
    result = {
        "run": run,
        "status": "complete" if diverged is None else "diverged",
        "diverged": None if diverged is None else {"step": diverged.step, "reason": str(diverged)},
        "softmax_n": experiment.softmax_n,
        "seed": args.seed,
        "test_pipeline": experiment.test_pipeline,
        "argv": command,
        "settings": {**vars(experiment), **args.to_dict(), "push_to_hub": push_to_hub},
        "effective_batch_size": effective_batch_size,
        "git": record.git_state(),
        "versions": record.versions(),
        "hardware": hardware,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "dataset": {
            "sources": [source["name"] for source in manifest["sources"]],
            "train_samples": len(data["train"]),
            "validation_samples": len(validation),
            "sha256": data_sha,
        },
        "tokenizer": {"entries": len(tokenizer), "sha256": tokenizer_sha},
        "model": {
            "path": args.output_dir,
            "parameters": parameters,
            "gate_parameters": gates,
            "initial_weights": initial_weights,
        },
        "training": {
            "steps": step,
            "planned_steps": trainer.state.max_steps,
            **counts,
            "wall_seconds": seconds,
            "cost_usd": None if usd_per_hour is None else seconds / 3600 * usd_per_hour,
            "loss_mean": mean_over_steps(loss_history),
        },
        "loss_history": loss_history,
        "validation_loss_history": sorted(validation_history.items()),
        **measured,
        "emergence": bookkeeping.emerged,
        "emergence_texts": len(watched),
    }
    record.write_json(results_path, result)
    if diverged is not None:  # a result like any other: a run that is left out makes its arm look better
        sys.exit(f"error: {run} diverged, {diverged}: {results_path} records it; a lower --learning_rate may help")
    for old in Path(args.output_dir).glob("checkpoint-*"):  # they served to resume; the run is complete
        shutil.rmtree(old)
    print(
        f"{run}: {step} steps in {seconds:.0f} s, mean training loss {mean_over_steps(loss_history):.4f}, "
        f"held-out loss {loss:.4f} over {masked_tokens:,} masked tokens\n"
        f"model: {args.output_dir}\nresult: {results_path}"
    )
    if push_to_hub:
        hub.push(args.output_dir, results_path, private=bool(args.hub_private_repo))


def main(argv: list[str] | None = None) -> None:
    experiment, args = parse(argv)
    with attention_backend(experiment.attention):
        train(experiment, args, record.command_line() if argv is None else ["train_model.py", *argv])


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {record.one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
