"""Train one arm of the experiment: RoBERTa with softmax_n attention, on data/ with tokenizer/, from random weights.

    python train_model.py                       softmax, the published settings
    python train_model.py --use_softmax1        softmax1, the same batches, masks and initial weights
    python train_model.py --softmax_n 0.5 --seed 43
    python train_model.py --softmax_n learned   an n for each head, which starts at 1 and is trained
    python train_model.py --config_overrides num_hidden_layers=4,hidden_size=256,num_attention_heads=4
    python train_model.py --test_pipeline       the whole path in a minute or two, on the embedded sample, in scratch/
    python train_model.py --push_to_hub         and push model, tokenizer and card in the end (see hub.py)

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py). Writes models/<run>/ (model and tokenizer) and
results/<run>.json (record.py says with what). An interrupted run goes on from its last checkpoint when the same command
is given again. The flags of transformers' TrainingArguments work, or are refused in one line (--help_all has them all);
the defaults are the published experiment's.
"""

import argparse
import contextlib
import copy
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

import datasets
import numpy as np
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoModelForMaskedLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks

import hub
import record
from checkpoints import checkpoint_to_go_on_from, delete_checkpoints, read_progress, seal
from controls import GATE
from corpus import load_data, load_tokenizer, tokenized
from experiment import (
    EFFECTIVE_BATCH_SIZE,
    MAX_LENGTH,
    MLM_PROBABILITY,
    OWN_PARAMETERS,
    REMEDIES,
    VOCAB_SIZE,
    accept_packed_batches,
    build_model,
    config_overrides,
    longest_text,
    read_softmax_n,
    run_name,
)
from folder import locked, refuse_unwritable
from held_out import (
    HELD_OUT_SEED,
    evenly_spread,
    held_out_batches,
    held_out_loss,
    losses_without_context,
    padded_batches,
    perplexity,
)
from kurtosis import ActivationKurtosis, weight_excess_kurtosis
from outliers import Emergence, sinks_by_layer
from packing import MaskedLMCollator, NothingToMask, on_device, summed_loss
from runs import read_results
from softmax1 import (
    BACKENDS,
    LEARNED,
    attention_backend,
    checked_softmax_n,
    learned_sinks,
    softmax_n_attention_varlen,
)
from tables import duration

# Tokens to a multiple of which a packed batch is filled up for a compiled model: each new shape costs a compilation.
BUCKET = 128

# Outliers are watched growing on so many texts of the held-out split: evenly spread over it and unmasked, as the texts
# of the analysis are. Before the first update, and whenever the loss is logged.
EMERGENCE_TEXTS = 64
EMERGENCE_BATCH = 16

# USD an hour of the machine that the GPU was rented in: AWS g5.2xlarge, as the published run paid it.
USD_PER_HOUR = {"NVIDIA A10G": 1.212}

# Flags of TrainingArguments that would change nothing here, or break the comparison, with the reason. They may be
# given with their default value. What is not named here works as transformers documents it.
REFUSED = {
    "label_smoothing_factor": "the loss is the published cross-entropy",
    "average_tokens_across_devices": "the loss is the mean over the masked tokens of the whole batch",
    "neftune_noise_alpha": "its noise would depend on how a batch is packed",
    "logging_nan_inf_filter": "a loss that is no number is a result, and ends the run",
    "train_sampling_strategy": "the samples come in the published, shuffled order",
    "group_by_length": "the samples come in the published, shuffled order",
    "length_column_name": "the samples come in the published, shuffled order",
    "dataloader_in_order": "the samples come in the published, shuffled order",
    "ignore_data_skip": "a run that goes on sees what it would have seen",
    "accelerator_config": "every process makes the whole batch and keeps its share of it",
    "dataloader_persistent_workers": "this script does not use it",
    "dataloader_multiprocessing_context": "this script does not use it",
    "remove_unused_columns": "the tokenized dataset has one column",
    "label_names": "the labels are the masked tokens",
    "auto_find_batch_size": "the batch is a setting of the experiment",
    "torch_empty_cache_steps": "this script does not use it",
    "use_liger_kernel": "it has nothing for this model",
    "liger_kernel_config": "it has nothing for this model",
    "use_cache": "a masked language model has no cache",
    "fsdp": "the model fits one device; several processes share the batch (torchrun)",
    "fsdp_config": "the model fits one device; several processes share the batch (torchrun)",
    "deepspeed": "the model fits one device; several processes share the batch (torchrun)",
    "parallelism_config": "the model fits one device; several processes share the batch (torchrun)",
    "bf16_full_eval": "the held-out loss is that of the weights in float32",
    "fp16_full_eval": "the held-out loss is that of the weights in float32",
    "prediction_loss_only": "the held-out loss is all that is evaluated",
    "include_for_metrics": "the held-out loss is all that is evaluated",
    "batch_eval_metrics": "the held-out loss is all that is evaluated",
    "eval_do_concat_batches": "the held-out loss is all that is evaluated",
    "eval_use_gather_object": "the held-out loss is all that is evaluated",
    "eval_accumulation_steps": "the held-out loss is all that is evaluated",
    "do_predict": "the held-out loss is all that is evaluated",
    "load_best_model_at_end": "the last model is the one that is compared",
    "metric_for_best_model": "the last model is the one that is compared",
    "greater_is_better": "the last model is the one that is compared",
    "save_only_model": "a checkpoint is there to go on from",
    "save_on_each_node": "the first process writes the checkpoints",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM write a checkpoint without it",
    "restore_callback_states_from_checkpoint": "a checkpoint has all that is needed without it",
    "run_name": "a run is named by its arm and its seed",
    "hub_token": "on a command line others read it: put HUGGINGFACE_TOKEN into .env instead",
    "hub_model_id": "a model goes to <HUGGINGFACE_USER>/<run>",
    "hub_strategy": "the finished model is pushed, once",
    "hub_always_push": "the finished model is pushed, once",
    "hub_revision": "the finished model is pushed, once",
}
# Optimizers that need another loop than ours, and those that look at --optim_args or --optim_target_modules.
REFUSED_OPTIMIZERS = re.compile(r"lomo|adalomo|schedule_free_\w+|\w+_layerwise")
TAKES_NO_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")
TAKES_TARGET_MODULES = ("galore_", "apollo_")

TAKE_JSON = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")

# What a number may be: (lowest, below). NaN lies nowhere.
MANY = 1 << 31
BOUNDS = {
    "seed": (0, 1 << 32),  # numpy's
    "data_seed": (0, 1 << 32),
    "per_device_train_batch_size": (1, MANY),
    "per_device_eval_batch_size": (1, MANY),
    "gradient_accumulation_steps": (1, MANY),
    "max_steps": (-1, MANY),
    "num_train_epochs": (0, MANY),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, MANY),
    "logging_steps": (0, MANY),
    "eval_steps": (0, MANY),
    "save_steps": (0, MANY),
    "eval_delay": (0, MANY),
    "save_total_limit": (1, MANY),
    "dataloader_num_workers": (0, 1 << 10),
    "dataloader_prefetch_factor": (1, MANY),
    "ddp_timeout": (1, MANY),
    "usd_per_hour": (0, math.inf),
}

# What --help shows of the flags, in this order, with our words for those of TrainingArguments; --help_all has the rest.
HELP = {
    "what is trained": {
        "softmax_n": "",
        "use_softmax1": "",
        "control": "",
        "seed": "of the weights, the order of the samples, their masks and dropout",
        "config_overrides": "",
        "vocab_size": "",
    },
    "from what, and where to": {
        "data_dir": "",
        "tokenizer_dir": "",
        "output_dir": "",
        "results_dir": "",
        "overwrite": "",
        "resume_from_checkpoint": "checkpoint to go on from (the newest of this run)",
        "push_to_hub": "push the finished model to the Hub",
        "hub_private_repo": "into a private repository",
        "usd_per_hour": "",
    },
    "the text": {"max_length": "", "mlm_probability": "", "max_eval_samples": ""},
    "the training": {
        "num_train_epochs": "passes over the data",
        "max_steps": "updates, in place of epochs; -1 for none",
        "per_device_train_batch_size": "",
        "gradient_accumulation_steps": "batches that make an update",
        "learning_rate": "where it is highest",
        "lr_scheduler_type": "how it falls: linear, cosine, constant and others",
        "warmup_steps": "updates in which it rises from 0; below 1, the share of them",
        "weight_decay": "of all weights but biases and LayerNorms (0)",
        "adam_beta1": "",
        "adam_beta2": "",
        "max_grad_norm": "what gradients are clipped to; 0 for no clipping",
        "optim": "optimizer",
    },
    "how it is computed": {
        "padded": "",
        "attention": "",
        "statistics_steps": "",
        "bf16": "compute in bfloat16, keep the weights in float32",
        "torch_compile": "compile the model",
        "use_cpu": "train on the CPU though there is a GPU",
        "dataloader_num_workers": "processes that make batches",
    },
    "log and checkpoints": {
        "logging_steps": "updates between two entries of the log",
        "eval_steps": "updates between two held-out losses",
        "save_steps": "updates between two checkpoints",
        "report_to": "tensorboard, trackio, wandb or another: draws losses, kurtosis, null mass and sinks",
        "disable_tqdm": "lines in place of a bar (so where there is no terminal)",
    },
    "trying it out": {"test_pipeline": ""},
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

    softmax_n: str | None = field(
        default=None,
        metadata={"metavar": "N", "help": "n of the attention, >= 0 (0: softmax), or learned: one a head, trained"},
    )
    use_softmax1: bool = field(default=False, metadata={"help": "short for --softmax_n 1"})
    control: str | None = field(
        default=None,
        metadata={"choices": list(REMEDIES), "help": "a published remedy in place of softmax_n (see controls.py)"},
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
        metadata={"choices": list(BACKENDS), "help": "the kernel of softmax_n attention; auto is the fastest"},
    )
    statistics_steps: int = field(
        default=10, metadata={"help": "steps between measurements of the activations' kurtosis; published: 1"}
    )
    max_length: int = field(default=MAX_LENGTH, metadata={"help": "tokens of a sample at most; the rest is cut off"})
    mlm_probability: float = field(
        default=MLM_PROBABILITY, metadata={"help": "share of the tokens that are masked, 80/10/10"}
    )
    vocab_size: int = field(default=VOCAB_SIZE, metadata={"help": "rows of the embedding; >= the tokenizer's entries"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "so many held-out samples, evenly spread (all)"}
    )
    config_overrides: str = field(
        default="", metadata={"help": 'another size: "num_hidden_layers=4,hidden_size=256,..." (of RobertaConfig)'}
    )
    usd_per_hour: float | None = field(
        default=None, metadata={"help": "price of this machine, for the cost; that of an A10G is known"}
    )

    def __post_init__(self):
        n = None if self.softmax_n is None else read_softmax_n(self.softmax_n)
        if self.use_softmax1 and n not in (None, 1):
            raise ValueError(f"--use_softmax1 means --softmax_n 1, which contradicts --softmax_n {self.softmax_n}")
        n = 1.0 if self.use_softmax1 else n or 0.0
        self.softmax_n = n if n == LEARNED else checked_softmax_n(n)
        if self.control and self.softmax_n:
            raise ValueError(f"--control {self.control} has an attention of its own, without --softmax_n")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability:g}")
        overrides = config_overrides(self.config_overrides)
        self.config_overrides = ",".join(f"{key}={value}" for key, value in overrides.items())  # one way to write it
        positions = longest_text(overrides)
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
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "samples that a process takes at a time (16 over all processes)"}
    )
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
        self.bookkeeping: Bookkeeping | None = None
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

    def _save(self, output_dir=None, state_dict=None):
        # Trainer's own also writes its arguments as a pickle, which runs code when it is loaded. Nothing here reads it.
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with how far outliers have grown beside every training loss, so that --report_to draws it too."""
        if math.isfinite(logs.get("loss", math.nan)):
            logs |= self.bookkeeping.watch()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model) -> list[str]:
        sinks = learned_sinks(model)  # decay would pull every n to 1
        return [name for name in super().get_decay_parameter_names(model) if name not in sinks]

    def create_optimizer(self, *args, **kwargs):
        with refused(f"--optim {self.args.optim.value}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        with refused(f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"):
            return super().create_scheduler(*args, **kwargs)

    def counts(self) -> dict[str, int]:
        """What the run has seen so far, over all processes. Every process has to call it."""
        padded_tokens = self.accelerator.reduce(torch.tensor(self.padded_tokens, device=self.args.device), "sum")
        return {"samples": self.samples, "tokens": self.tokens, "padded_tokens": int(padded_tokens)}


@contextlib.contextmanager
def refused(flag: str) -> Iterator[None]:
    """Exit with one line that names the flag where the block fails, as transformers does for a package that is missing
    and for arguments that do not fit."""
    try:
        yield
    except Exception as error:  # of as many kinds as there are optimizers
        sys.exit(f"error: {flag}: {record.one_line(error)}")


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
            self.emerged = []
            self.trainer.log(self.watch())
        if self.window is not None:
            trainer = self.trainer
            trainer._globalstep_last_logged, losses = self.window
            trainer._tr_loss += losses[args.process_index]

    def watch(self) -> dict[str, float]:
        """What Emergence measures of the model as it is now, by names that trackers group as of held-out texts."""
        found = self.emergence(self.trainer.model)
        self.emerged.append({"step": self.trainer.state.global_step, **found})
        return {f"eval_{name}": value for name, value in found.items()}

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
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            record.write_json(checkpoint / "progress.json", progress)
            seal(checkpoint)
            if args.save_total_limit:  # only now, when the new one is whole, may older ones go
                delete_checkpoints(args.output_dir, keep=args.save_total_limit)

    def restore(self, checkpoint: str) -> None:
        """Take up the counts of an earlier session. Exits when that session had other settings."""
        progress = read_progress(checkpoint)
        had = progress["settings"]
        for name, value in self.settings.items():
            if name in had and had[name] != value:
                sys.exit(
                    f"error: {checkpoint} was made with {name} = {had[name]}, not {value}: "
                    "give the same settings to go on with it, or --overwrite to start again"
                )
        self.seconds_before = progress["seconds"]
        trainer, counts = self.trainer, progress["counts"]
        trainer.samples, trainer.tokens = counts["samples"], counts["tokens"]
        if trainer.is_world_process_zero():  # the sums over all processes, which are to count once
            trainer.padded_tokens = counts["padded_tokens"]
            trainer.statistics.load_state(progress["activation_kurtosis"])
        self.emerged = progress["emergence"]
        self.window = progress["loss_window"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise Diverged(name, logs[name], state.global_step)


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


def shown(logs: dict[str, float] | None) -> dict[str, float]:
    """What a terminal or a log shows of the figures; trackers draw the others too."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    return {name: logs[name] for name in names if name in (logs or {})}


class Bar(ProgressCallback):
    """In a terminal: Trainer's bar, with a line of figures at every logging step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if found := shown(logs):
            super().on_log(args, state, control, logs=found, **kwargs)


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
        if found := shown(logs):
            self.tell(state, "".join(f", {name} {value:.4g}" for name, value in found.items()))

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
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 "
        "adam_epsilon max_grad_norm optim optim_args optim_target_modules dataloader_drop_last bf16 fp16"
    ).split()
    as_json = args.to_dict()  # enumerations by their values
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
        **{name: as_json[name] for name in names},
    }


def refuse_other_settings(results_path: Path, experiment: ExperimentArguments, args: TrainingArguments) -> None:
    """Exit with one line when a finished run was not trained as is wanted now, and so belongs to another experiment."""
    results = read_results(results_path)
    if "settings" not in results:
        return
    _, manifest = load_data(experiment.data_dir)
    tokenizer_sha = record.sha256(Path(experiment.tokenizer_dir) / "tokenizer.json")
    asked = shaping_settings(experiment, args, manifest["splits"]["train"]["sha256"], tokenizer_sha)
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


# -------------------------------------------------------------------------------------------------------------- main


class Parser(command.Parser, HfArgumentParser):
    """All flags, ours and those of TrainingArguments; --help shows the ones of HELP, --help_all the others too."""

    def __init__(self):
        super().__init__(
            dataclass_types=(ExperimentArguments, PublishedTrainingArguments), description=__doc__, add_help=False
        )
        self.add_argument("-h", "--help", action="help", help="show the flags that matter, and exit")
        self.add_argument("--help_all", action=HelpAll, help="show those of TrainingArguments that are left, too")

    def format_help(self, everything: bool = False) -> str:
        actions = {action.option_strings[0]: action for action in self._actions}
        text = argparse.RawDescriptionHelpFormatter(self.prog, max_help_position=36)
        text.add_usage("%(prog)s [flags]", [], [])
        text.add_text(self.description)
        groups = {title: {f"--{name}": words for name, words in flags.items()} for title, flags in HELP.items()}
        groups["help"] = {"-h": "", "--help_all": ""}
        if everything:
            told = {flag for flags in groups.values() for flag in flags}
            left = [flag for flag, action in actions.items() if flag not in told and action.dest not in REFUSED]
            groups["the rest of TrainingArguments"] = dict.fromkeys(left, "")
        for title, flags in groups.items():
            text.start_section(title)
            text.add_arguments([readable(actions[flag], words) for flag, words in flags.items()])
            text.end_section()
        if everything:
            reasons = [f"  --{name}: {why}" for name, why in REFUSED.items() if f"--{name}" in actions]
            text.add_text("refused, because it would change nothing or break the comparison:\n" + "\n".join(reasons))
        return text.format_help()


class HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *rest):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def readable(action: argparse.Action, words: str) -> argparse.Action:
    """A flag as the help shows it: by one of its spellings, with its default, in `words` or its own first sentence."""
    shown = copy.copy(action)
    shown.option_strings = [text for text in action.option_strings if "-" not in text[2:]]
    if action.nargs == "?":  # "--padded" and "--padded True" are one
        shown.nargs = 0
    elif action.choices is None or len(action.choices) > 6:
        shown.metavar = action.metavar or {int: "N", float: "X"}.get(action.type, "TEXT")
    what = words or " ".join((action.help or "").split()).partition(". ")[0].rstrip(".")
    default = action.default
    if isinstance(default, (list, dict)) or default in (None, "", False, argparse.SUPPRESS):
        default = ""
    shown.help = (what + (f" ({getattr(default, 'value', default)})" if default != "" else "")).replace("%", "%%")
    return shown


def parse(argv: list[str] | None) -> tuple[ExperimentArguments, PublishedTrainingArguments]:
    """The flags, checked: exits with one line where a training with them is impossible, or not what it seems."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser()
    parser.set_defaults(use_cpu=None)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        # The flag alone: its value may be a secret that belonged to another flag.
        sys.exit(f"error: unknown argument: {unknown[0].split('=')[0]} (see python train_model.py --help)")
    for name, why in REFUSED.items():
        if name in known and getattr(known, name) != parser.get_default(name):
            sys.exit(f"error: --{name} is not for this script: {why}")
    check_numbers(known)
    check_device(known.use_cpu)
    # Trainer refuses bfloat16 on a CPU unless it is told that the CPU is meant.
    parser.set_defaults(use_cpu=not usable_gpu(), disable_tqdm=not sys.stderr.isatty())
    if known.test_pipeline:  # as argparse reads it, in whatever spelling
        parser.set_defaults(**TEST_PIPELINE)
    try:
        experiment, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # TrainingArguments refuses what this machine cannot do by whatever fails first
        sys.exit(f"error: {record.one_line(error)}")
    check_choices(experiment, args)
    return experiment, args


def check_numbers(known: argparse.Namespace) -> None:
    """Exit with one line for a number that no training can have."""
    for name, (lowest, below) in BOUNDS.items():
        value = getattr(known, name, None)
        if value is not None and not lowest <= value < below:  # NaN is neither
            upwards = f"from {lowest} on" if below == math.inf else f"from {lowest} to below {below}"
            got = f"{value:g}" if isinstance(value, float) else str(value)[:24]
            sys.exit(f"error: --{name} must be a number {upwards}, got {got}")
    for name in TAKE_JSON:
        text = getattr(known, name, None)
        with refused(f"--{name} needs a JSON object"):
            if text is not None and not isinstance(json.loads(text), dict):
                raise ValueError(text)
    if known.max_steps == 0:
        sys.exit("error: --max_steps must be at least 1, or -1 for whole epochs, got 0")
    if known.max_steps < 0 and known.num_train_epochs == 0:
        sys.exit("error: --num_train_epochs must be above 0, got 0")
    for what in ("logging", "eval", "save"):
        if getattr(known, f"{what}_steps") == 0:
            sys.exit(f"error: --{what}_steps must be above 0; --{what}_strategy no does without")


def check_choices(experiment: ExperimentArguments, args: PublishedTrainingArguments) -> None:
    """Exit with one line for a choice that this script does not make, and for a tracker that is not installed."""
    if args.save_strategy == "best":
        sys.exit("error: --save_strategy best: the last model is the one that is compared")
    if experiment.overwrite and args.resume_from_checkpoint:
        sys.exit("error: --overwrite starts again, which contradicts --resume_from_checkpoint: give one of them")
    optimizer = args.optim.value
    if REFUSED_OPTIMIZERS.fullmatch(optimizer):
        sys.exit(f"error: --optim {optimizer} needs a training loop of its own: choose another")
    if args.optim_args and optimizer in TAKES_NO_ARGUMENTS:
        sys.exit(f"error: --optim {optimizer} does not look at --optim_args: leave them out")
    if args.optim_target_modules and not optimizer.startswith(TAKES_TARGET_MODULES):
        sys.exit(f"error: --optim {optimizer} does not look at --optim_target_modules: leave them out")
    for tracker in args.report_to:
        with refused(f"--report_to {tracker}"):
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()


def check_device(use_cpu: bool | None) -> None:
    """Exit with one line where a GPU is meant, or there to be seen, that the training could not use."""
    if usable_gpu() or use_cpu:
        return
    if use_cpu is not None:
        why = "the statistics need float64, which Apple's GPUs lack" if has_mps() else "PyTorch finds no GPU here"
        sys.exit(f"error: --use_cpu False, but {why}")
    if seen := visible_gpu():
        sys.exit(
            f"error: {seen}, which PyTorch {torch.__version__} cannot use: install a PyTorch for its CUDA driver, or "
            "give --use_cpu to train on the CPU"
        )


def has_mps() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "mps"


def usable_gpu() -> bool:
    """Whether PyTorch has an accelerator that computes in float64, as the statistics do. Apple's does not."""
    return torch.accelerator.is_available() and not has_mps()


def visible_gpu() -> str | None:
    """What says that a GPU is there: nvidia-smi, or else CUDA_VISIBLE_DEVICES; None where that hides all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return None
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
            if found := re.search(r"^GPU 0: (.*?)(?: \(|$)", listed, re.MULTILINE):
                return f"nvidia-smi sees {found[1]}"
    if visible and re.match(r"\d|GPU-|MIG-", visible):
        return f"CUDA_VISIBLE_DEVICES={visible} names a GPU"
    return None


def check_backend(backend: str, args: TrainingArguments) -> None:
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
    reloaded = accept_packed_batches(AutoModelForMaskedLM.from_pretrained(args.output_dir).to(trainer.model.device))
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
        with locked(f"{folder}-sample"):  # of several runs that start together, one builds it
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
    run = run_name(experiment.softmax_n, args.seed, experiment.control)
    args.output_dir = args.output_dir.replace("<run>", run)
    args.run_name = run
    results_path = Path(experiment.results_dir) / f"{run}.json"
    if results_path.exists() and not experiment.overwrite:
        sys.exit(
            f"error: {run} is complete ({results_path} is there): move it away, or pass --overwrite to train again"
        )
    check_backend(experiment.attention, args)
    if args.n_gpu > 1:
        sys.exit(f"error: {args.n_gpu} GPUs are visible but one process drives one: set CUDA_VISIBLE_DEVICES=0")
    # Pushing is the last thing done here. Trainer would push during training, with transformers' own card.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    if push_to_hub and args.process_index == 0:
        hub.check()
    if args.process_index == 0:
        print(f"{run} trains on {record.hardware(args.device)['name']} ({args.device})", flush=True)
        refuse_unwritable(args.output_dir)
    with locked(args.output_dir, wait=False) if args.process_index == 0 else contextlib.nullcontext():
        train_alone(experiment, args, command, results_path, push_to_hub)


@dataclass
class Inputs:
    """What a run is trained on, and what it is judged on."""

    train: datasets.Dataset
    validation: datasets.Dataset  # or so much of it as --max_eval_samples says
    watched: list[list[int]]  # texts on which outliers are watched growing
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha: str
    manifest: dict  # of the dataset

    @property
    def data_sha(self) -> str:
        return self.manifest["splits"]["train"]["sha256"]


@dataclass
class Outcome:
    """How a training ended, over all its sessions."""

    state: TrainerState
    counts: dict[str, int]  # see ExperimentTrainer.counts
    seconds: float
    emerged: list[dict[str, float]]  # see Bookkeeping.watch
    measured: dict  # "validation" and the statistics of the finished model
    diverged: Diverged | None


def train_alone(
    experiment: ExperimentArguments,
    args: PublishedTrainingArguments,
    command: list[str],
    results_path: Path,
    push_to_hub: bool,
) -> None:
    """Train where nobody else trains the same run."""
    inputs = inputs_of(experiment, args)
    model, described = model_of(experiment, args, inputs.tokenizer)
    refuse_unwritable(experiment.results_dir)
    checkpoint = checkpoint_of(experiment, args)
    trainer = trainer_of(experiment, args, inputs, model)
    is_main = trainer.is_world_process_zero()
    if checkpoint is not None:
        trainer.bookkeeping.restore(checkpoint)
    if is_main:
        if checkpoint is not None:
            print(f"Going on from {checkpoint}")
        print(
            f"{args.run_name}: {described['parameters']:,} parameters, {len(inputs.train):,} samples, "
            f"effective batch {effective_batch_size(args)}, "
            f"{len(inputs.tokenizer):,} of {experiment.vocab_size:,} vocabulary rows in use"
        )
    diverged = fit(trainer, checkpoint)
    outcome = saved_and_measured(trainer, experiment, inputs, diverged)
    if torch.distributed.is_initialized():  # nothing is exchanged from here on; leaving it open can abort an exit
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not is_main:
        sys.exit(0 if outcome.diverged is None else 1)

    asked = {"argv": command, "settings": {**vars(experiment), **args.to_dict(), "push_to_hub": push_to_hub}}
    made = {"git": record.git_state(), "versions": record.versions(), "hardware": record.hardware(model.device)}
    result = result_of(experiment, args, asked, made, inputs, described, outcome)
    record.write_json(results_path, result)
    if outcome.diverged is not None:  # a result like any other: a run that is left out makes its arm look better
        why = f"{args.run_name} diverged, {outcome.diverged}"
        sys.exit(f"error: {why}: {results_path} records it; a lower --learning_rate may help")
    delete_checkpoints(args.output_dir)  # they served to resume; the run is complete
    training, validation = result["training"], result["validation"]
    print(
        f"{args.run_name}: {training['steps']} steps in {training['wall_seconds']:.0f} s, mean training loss "
        f"{training['loss_mean']:.4f}, held-out loss {validation['loss']:.4f} over {validation['masked_tokens']:,} "
        f"masked tokens\nmodel: {args.output_dir}\nresult: {results_path}"
    )
    if push_to_hub:
        hub.push(args.output_dir, results_path, private=bool(args.hub_private_repo))


def inputs_of(experiment: ExperimentArguments, args: TrainingArguments) -> Inputs:
    """Dataset, tokenized once for all runs, and tokenizer. Exits with one line where they are not what they should be.

    Of several processes the first prepares them, and the others take what they find.
    """
    with args.main_process_first(desc="preparing the data"):
        if experiment.test_pipeline:
            build_test_inputs(experiment.data_dir, experiment.tokenizer_dir)
        data, manifest = load_data(experiment.data_dir)
        tokenizer = load_tokenizer(experiment.tokenizer_dir, experiment.vocab_size)
        data_sha = manifest["splits"]["train"]["sha256"]
        tokenizer_sha = record.sha256(Path(experiment.tokenizer_dir) / "tokenizer.json")
        folder = Path(experiment.data_dir) / f"tokenized-{data_sha[:8]}-{tokenizer_sha[:8]}-{experiment.max_length}"
        data = tokenized(data, folder, tokenizer, experiment.max_length)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(data["train"]) < batch:
        sys.exit(
            f"error: a batch of {batch:,} is more than the {len(data['train']):,} training samples, so "
            "--dataloader_drop_last leaves none: choose a smaller batch"
        )
    validation = data["validation"]
    watched = emergence_texts(validation)
    if experiment.max_eval_samples is not None:
        validation = validation.select(evenly_spread(len(validation), experiment.max_eval_samples))
    return Inputs(data["train"], validation, watched, tokenizer, tokenizer_sha, manifest)


def model_of(
    experiment: ExperimentArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, dict]:
    """The model with its first weights, and what the record says of it.

    Exits with one line where the memory cannot hold it, or the disk not what will be written of it.
    """
    overrides = config_overrides(experiment.config_overrides)
    design = (experiment.softmax_n, experiment.vocab_size, tokenizer, args.seed, overrides, experiment.control)
    with torch.device("meta"):  # without memory, to see first whether there is room
        parameters = sum(parameter.numel() for parameter in build_model(*design).parameters())
    # A checkpoint holds the weights and two moments; the old one goes only when the new one is whole. Then the model.
    needed = parameters * 4 * (3 + 3 + 1)
    if shutil.disk_usage(args.output_dir).free < needed:
        sys.exit(
            f"error: {args.output_dir} needs {needed / 1e9:.1f} GB for checkpoints and model, but the disk has less"
        )
    try:
        model = build_model(*design)
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"error: no memory for {parameters:,} parameters ({record.one_line(error)}): choose a smaller model")
    described = {
        "path": args.output_dir,
        "parameters": parameters,
        "gate_parameters": sum(parameter.numel() for name, parameter in model.named_parameters() if GATE in name),
        "sink_parameters": sum(parameter.numel() for parameter in learned_sinks(model).values()),
        # Says that both arms of a pair started from the same point; gates and sinks are what one has beyond the other.
        "initial_weights": record.weights_sha256(model, leave_out=OWN_PARAMETERS),
    }
    return model, described


def checkpoint_of(experiment: ExperimentArguments, args: TrainingArguments) -> str | None:
    """The checkpoint to go on from; None to start at the beginning, as --overwrite does, which deletes the old ones."""
    if not experiment.overwrite:
        with args.main_process_first(desc="looking for checkpoints"):  # the others find what is left of them
            return checkpoint_to_go_on_from(args.resume_from_checkpoint, args.output_dir)
    if args.process_index == 0:
        delete_checkpoints(args.output_dir)
    return None


def trainer_of(
    experiment: ExperimentArguments, args: TrainingArguments, inputs: Inputs, model: PreTrainedModel
) -> ExperimentTrainer:
    masking = {"tokenizer": inputs.tokenizer, "mlm_probability": experiment.mlm_probability}
    held_out = held_out_batches(
        inputs.validation, MaskedLMCollator(**masking, seed=HELD_OUT_SEED), args.per_device_eval_batch_size
    )
    collator = MaskedLMCollator(
        **masking,
        seed=args.seed,
        packed=not experiment.padded,
        bucket=BUCKET if args.torch_compile else 1,
        rank=args.process_index,
        world_size=args.world_size,
    )
    emergence = Emergence(padded_batches(inputs.tokenizer, inputs.watched, EMERGENCE_BATCH), inputs.tokenizer)
    bookkeeping = Bookkeeping(shaping_settings(experiment, args, inputs.data_sha, inputs.tokenizer_sha), emergence)
    # Trainer takes the model's **kwargs for the wish to be told the number of labels, and would count them every step.
    model.accepts_loss_kwargs = False
    with refused("transformers' Trainer"):
        trainer = ExperimentTrainer(
            model=accept_packed_batches(model),
            args=args,
            train_dataset=inputs.train,
            eval_dataset=inputs.validation,
            data_collator=collator,
            processing_class=inputs.tokenizer,
            callbacks=[bookkeeping],
            held_out=held_out,
            statistics=ActivationKurtosis(model),
            statistics_steps=experiment.statistics_steps,
            packed=not experiment.padded,
        )
    bookkeeping.trainer, trainer.bookkeeping = trainer, bookkeeping
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LogLines() if args.disable_tqdm else Bar())
    return trainer


def fit(trainer: ExperimentTrainer, checkpoint: str | None) -> Diverged | None:
    """Train to the last step; how it diverged, if it did. Exits when a signal has asked to stop before."""
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    diverged = None
    try:
        ended = None
        if checkpoint is not None:
            ended = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if ended is not None and ended.global_step >= ended.max_steps:
            # Only what comes behind the training was interrupted. Trainer would train a step more.
            trainer.state = ended
            trainer.model.load_state_dict(AutoModelForMaskedLM.from_pretrained(checkpoint).state_dict())
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        diverged = error
    finally:
        stop.restore()
    if stop.asked is not None and trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        print(f"{trainer.args.run_name} stopped at step {step:,}: the same command goes on from there")
        sys.exit(128 + stop.asked)
    return diverged


def saved_and_measured(
    trainer: ExperimentTrainer, experiment: ExperimentArguments, inputs: Inputs, diverged: Diverged | None
) -> Outcome:
    """Save the model, unless it diverged, look whether what was saved is it, and measure it. Every process calls it."""
    seconds = trainer.bookkeeping.seconds
    if diverged is None:
        trainer.save_model()  # first of all: nothing below may cost the trained model
        trainer.args.distributed_state.wait_for_everyone()
    unigram, context_free = losses_without_context(
        inputs.train, trainer.held_out, inputs.tokenizer, experiment.vocab_size
    )
    validation = {"loss": None, "perplexity": None, "masked_tokens": 0}
    validation |= {"unigram_loss": unigram, "context_free_loss": context_free, "samples": len(inputs.validation)}
    statistics = {"weight_excess_kurtosis": {}, "activation_excess_kurtosis": {}, "log_n": {}}
    counts = trainer.counts()
    if diverged is None:
        loss, masked_tokens = saved_loss(trainer, trainer.held_out, experiment)
        if not math.isfinite(loss):
            diverged = Diverged("the held-out loss", loss, trainer.state.global_step)
        validation |= {"loss": loss, "perplexity": perplexity(loss), "masked_tokens": masked_tokens}
        statistics = {
            "weight_excess_kurtosis": weight_excess_kurtosis(trainer.model),
            "activation_excess_kurtosis": trainer.statistics.result(),
            "log_n": sinks_by_layer(trainer.model),
        }
    measured = {"validation": validation, **statistics}
    return Outcome(trainer.state, counts, seconds, trainer.bookkeeping.emerged, measured, diverged)


def effective_batch_size(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def result_of(
    experiment: ExperimentArguments,
    args: TrainingArguments,
    asked: dict,
    made: dict,
    inputs: Inputs,
    described: dict,
    outcome: Outcome,
) -> dict:
    """What results/<run>.json says, out of what is known; nothing is looked up or measured here.

    Args:
        asked: {"argv", "settings"}.
        made: {"git", "versions", "hardware"}, see record.py.
        described: what `model_of` says of the model.
    """
    step, diverged, seconds = outcome.state.global_step, outcome.diverged, outcome.seconds
    history = outcome.state.log_history
    loss_history = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation_history = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if (loss := outcome.measured["validation"]["loss"]) is not None:
        validation_history[step] = loss
    usd_per_hour = experiment.usd_per_hour
    if usd_per_hour is None:
        usd_per_hour = USD_PER_HOUR.get(made["hardware"]["name"])
    return {
        "run": args.run_name,
        "status": "complete" if diverged is None else "diverged",
        "diverged": None if diverged is None else {"step": diverged.step, "reason": str(diverged)},
        "softmax_n": experiment.softmax_n,
        "seed": args.seed,
        "test_pipeline": experiment.test_pipeline,
        **asked,
        "effective_batch_size": effective_batch_size(args),
        **made,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "dataset": {
            "sources": [source["name"] for source in inputs.manifest["sources"]],
            "train_samples": len(inputs.train),
            "validation_samples": len(inputs.validation),
            "sha256": inputs.data_sha,
        },
        "tokenizer": {"entries": len(inputs.tokenizer), "sha256": inputs.tokenizer_sha},
        "model": described,
        "training": {
            "steps": step,
            "planned_steps": outcome.state.max_steps,
            **outcome.counts,
            "wall_seconds": seconds,
            "cost_usd": None if usd_per_hour is None else seconds / 3600 * usd_per_hour,
            "loss_mean": mean_over_steps(loss_history),
        },
        "loss_history": loss_history,
        "validation_loss_history": sorted(validation_history.items()),
        **outcome.measured,
        "emergence": outcome.emerged,
        "emergence_texts": len(inputs.watched),
    }


def remedy(error: Exception, args: TrainingArguments) -> str | None:
    """What is wrong and what to do, of errors that come from the machine; None of others.

    PyTorch has a plain RuntimeError for most of them.
    """
    said = record.one_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search("out of memory|t allocate memory", said):
        size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if size == 1:
            return f"out of memory with one sample at a time ({said}): choose a smaller model or --max_length"
        parts = next(parts for parts in range(2, size + 1) if size % parts == 0)
        return (
            f"out of memory with {size} samples at a time ({said}): --per_device_train_batch_size {size // parts} "
            f"--gradient_accumulation_steps {steps * parts} keeps the effective batch (with checkpoints there, add "
            "--overwrite)"
        )
    if "DataLoader worker" in said:
        return (
            f"a process that makes batches has ended ({said}), often for lack of memory: give the same command again, "
            "it goes on from the last checkpoint; with a smaller --dataloader_num_workers, if it happens again"
        )
    if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|inline_container|iostream", said):
        return f"{args.output_dir} cannot be written ({said}): make room, and give the same command again"
    return None


def main(argv: list[str] | None = None) -> None:
    experiment, args = parse(argv)
    try:
        with attention_backend(experiment.attention):
            train(experiment, args, record.command_line() if argv is None else ["train_model.py", *argv])
    except NothingToMask as error:
        sys.exit(f"error: {record.one_line(error)}")
    except (RuntimeError, MemoryError, SafetensorError) as error:
        if (what := remedy(error, args)) is None:
            raise
        sys.exit(f"error: {what}")


if __name__ == "__main__":
    command.run(main)
