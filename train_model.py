"""Train one arm of the experiment: RoBERTa with softmax_n attention, on data/ with tokenizer/, from random weights.

    python train_model.py                       softmax, the published settings
    python train_model.py --use_softmax1        softmax1, the same batches, masks and initial weights
    python train_model.py --softmax_n 0.5 --seed 43
    python train_model.py --softmax_n learned   an n for each head, which starts at 1 and is trained
    python train_model.py --config_overrides num_hidden_layers=4,hidden_size=256,num_attention_heads=4
    python train_model.py --test_pipeline       all steps in a minute or two, on the embedded sample, in scratch/
    python train_model.py --push_to_hub         and push model, tokenizer and card at the end (see hub.py)

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py). Writes models/<run>/ (model and tokenizer) and
results/<run>.json (see `result_of`). An interrupted run continues from its last checkpoint when the same command is
given again. The flags of transformers' TrainingArguments work, or are refused in one line (--help_all shows all); the
defaults are those of the published experiment.
"""

import contextlib
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

import datasets
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
    TrainingArguments,
)

import arguments
import hub
import record
from arguments import ExperimentArguments, PublishedTrainingArguments, refused
from checkpoints import checkpoint_to_go_on_from, delete_checkpoints
from controls import GATE
from corpus import load_data, load_tokenizer, tokenized
from experiment import OWN_PARAMETERS, accept_packed_batches, build_model, config_overrides, run_name
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
from packing import MaskedLMCollator, NothingToMask
from runs import read_results
from softmax1 import attention_backend, learned_sinks, softmax_n_attention_varlen
from trainer import Bar, Diverged, ExperimentTrainer, LogLines, StopWhenAsked

# With --torch_compile, packed batches are padded to a multiple of this number of tokens: each new shape is compiled.
BUCKET = 128

# Outliers are measured during training on this number of held-out texts, evenly spread over the split and not masked,
# like the texts of the analysis.
EMERGENCE_TEXTS = 64
EMERGENCE_BATCH = 16

# USD an hour of the machine that was rented with a GPU: AWS g5.2xlarge, at the price of the published run.
USD_PER_HOUR = {"NVIDIA A10G": 1.212}


@dataclass
class Inputs:
    """The data and the tokenizer of a run."""

    train: datasets.Dataset
    validation: datasets.Dataset  # at most --max_eval_samples of it
    watched: list[list[int]]  # token ids of the texts on which outliers are measured during training
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha: str
    manifest: dict  # of the dataset

    @property
    def data_sha(self) -> str:
        return self.manifest["splits"]["train"]["sha256"]


@dataclass
class Outcome:
    """The end of a training. Counts and times are those of all its sessions."""

    state: TrainerState
    counts: dict[str, int]  # see ExperimentTrainer.counts
    seconds: float
    emerged: list[dict[str, float]]  # see ExperimentTrainer.watch
    measured: dict  # "validation", and statistics of the finished model
    diverged: Diverged | None


def train(experiment: ExperimentArguments, args: PublishedTrainingArguments, command: list[str]) -> None:
    """Train one arm, save it, and write its results file, which also records `command`."""
    transformers.logging.set_verbosity_warning()
    datasets.logging.set_verbosity_warning()
    if args.disable_tqdm:
        transformers.logging.disable_progress_bar()  # of reading and writing the weights
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
    # The model is pushed at the end. Trainer would push it during training, with transformers' own card.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    if push_to_hub and args.process_index == 0:
        hub.check()
    if args.process_index == 0:
        print(f"{run} trains on {record.hardware(args.device)['name']} ({args.device})", flush=True)
        refuse_unwritable(args.output_dir)
    with locked(args.output_dir, wait=False) if args.process_index == 0 else contextlib.nullcontext():
        train_alone(experiment, args, command, results_path, push_to_hub)


def check_backend(backend: str, args: TrainingArguments) -> None:
    """Exit with one line if the backend of --attention cannot compute the attention of this training."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    token = torch.zeros(1, 1, 8, device=args.device, dtype=dtype)
    bounds = torch.tensor([0, 1], device=args.device, dtype=torch.int32)
    try:
        softmax_n_attention_varlen(token, token, token, bounds, 1, dropout_p=0.1)
    except ValueError as error:
        sys.exit(f"error: --attention {backend}: {record.one_line(error)}")


def train_alone(
    experiment: ExperimentArguments,
    args: PublishedTrainingArguments,
    command: list[str],
    results_path: Path,
    push_to_hub: bool,
) -> None:
    """Train while no other process trains the same run."""
    inputs = inputs_of(experiment, args)
    model, description = model_of(experiment, args, inputs.tokenizer)
    refuse_unwritable(experiment.results_dir)
    checkpoint = checkpoint_of(experiment, args)
    trainer = trainer_of(experiment, args, inputs, model)
    is_main = trainer.is_world_process_zero()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if is_main:
        if checkpoint is not None:
            print(f"Going on from {checkpoint}")
        print(
            f"{args.run_name}: {description['parameters']:,} parameters, {len(inputs.train):,} samples, "
            f"effective batch {effective_batch_size(args)}, "
            f"{len(inputs.tokenizer):,} of {experiment.vocab_size:,} vocabulary rows in use"
        )
    diverged = fit(trainer, checkpoint)
    outcome = saved_and_measured(trainer, experiment, inputs, diverged)
    if torch.distributed.is_initialized():  # the processes exchange nothing more, and an open group can abort the exit
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not is_main:
        sys.exit(0 if outcome.diverged is None else 1)

    invocation = {"argv": command, "settings": {**vars(experiment), **args.to_dict(), "push_to_hub": push_to_hub}}
    environment = {"git": record.git_state(), "versions": record.versions(), "hardware": record.hardware(model.device)}
    result = result_of(experiment, args, invocation, environment, inputs, description, outcome)
    record.write_json(results_path, result)
    if outcome.diverged is not None:  # it is a result too: without this run its arm would look better
        why = f"{args.run_name} diverged, {outcome.diverged}"
        sys.exit(f"error: {why}: {results_path} records it; a lower --learning_rate may help")
    delete_checkpoints(args.output_dir)  # the run is complete, and will not be resumed
    training, validation = result["training"], result["validation"]
    print(
        f"{args.run_name}: {training['steps']} steps in {training['wall_seconds']:.0f} s, mean training loss "
        f"{training['loss_mean']:.4f}, held-out loss {validation['loss']:.4f} over {validation['masked_tokens']:,} "
        f"masked tokens\nmodel: {args.output_dir}\nresult: {results_path}"
    )
    if push_to_hub:
        hub.push(args.output_dir, results_path, private=bool(args.hub_private_repo))


def inputs_of(experiment: ExperimentArguments, args: TrainingArguments) -> Inputs:
    """The tokenized dataset and the tokenizer. Exits with one line if they are missing, damaged or do not fit.

    With several processes, the first prepares them, and the others read them.
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


def emergence_texts(validation: datasets.Dataset) -> list[list[int]]:
    """Token ids of EMERGENCE_TEXTS samples, evenly spread: in the split, one source follows another."""
    return validation[evenly_spread(len(validation), EMERGENCE_TEXTS)]["input_ids"]


def build_test_inputs(data_dir: str, tokenizer_dir: str) -> None:
    """A dataset of the embedded sample and a small tokenizer, for --test_pipeline on a fresh clone."""
    here = Path(__file__).parent
    for script, folder, options in (
        ("build_dataset.py", data_dir, ["--sample", "--validation_fraction", "0.1"]),
        ("train_tokenizer.py", tokenizer_dir, ["--data_dir", data_dir, "--vocab_size", "2048"]),
    ):
        with locked(f"{Path(folder)}-sample"):  # if several runs start at the same time, one builds it
            if not Path(folder).exists():
                command = [sys.executable, str(here / script), "--output_dir", folder, *options]
                if (status := subprocess.run(command).returncode) != 0:
                    sys.exit(status)


def model_of(
    experiment: ExperimentArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, dict]:
    """(model with its initial weights, its description for the results file).

    Exits with one line if the memory is too small for the model, or the disk for its checkpoints.
    """
    overrides = config_overrides(experiment.config_overrides)
    design = (experiment.softmax_n, experiment.vocab_size, tokenizer, args.seed, overrides, experiment.control)
    with torch.device("meta"):  # only to count, without memory for the weights
        parameters = sum(parameter.numel() for parameter in build_model(*design).parameters())
    # The kept checkpoints and one more, because the oldest is deleted last; each has the weights and two moments.
    # And the model.
    needed = parameters * 4 * (3 * ((args.save_total_limit or 1) + 1) + 1)
    if shutil.disk_usage(args.output_dir).free < needed:
        sys.exit(
            f"error: {args.output_dir} needs {needed / 1e9:.1f} GB for checkpoints and model, but the disk has less"
        )
    try:
        model = build_model(*design)
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"error: no memory for {parameters:,} parameters ({record.one_line(error)}): choose a smaller model")
    description = {
        "path": args.output_dir,
        "parameters": parameters,
        "gate_parameters": sum(parameter.numel() for name, parameter in model.named_parameters() if GATE in name),
        "sink_parameters": sum(parameter.numel() for parameter in learned_sinks(model).values()),
        # Shows that the arms of a seed started from the same weights. Not all arms have gates or sinks.
        "initial_weights": record.weights_sha256(model, leave_out=OWN_PARAMETERS),
    }
    return model, description


def checkpoint_of(experiment: ExperimentArguments, args: TrainingArguments) -> str | None:
    """The checkpoint to continue from; None to start from the beginning. With --overwrite, checkpoints are deleted."""
    if not experiment.overwrite:
        with args.main_process_first(desc="looking for checkpoints"):  # the first process may delete some of them
            return checkpoint_to_go_on_from(args.resume_from_checkpoint, args.output_dir)
    if args.process_index == 0:
        delete_checkpoints(args.output_dir)
    return None


def trainer_of(
    experiment: ExperimentArguments, args: TrainingArguments, inputs: Inputs, model: PreTrainedModel
) -> ExperimentTrainer:
    """The trainer of a run, which computes exactly what train_model.py does with these flags."""
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
    # Otherwise Trainer would count the labels in every step, because the model accepts **kwargs.
    model.accepts_loss_kwargs = False
    with refused("transformers' Trainer"):
        trainer = ExperimentTrainer(
            model=accept_packed_batches(model),
            args=args,
            train_dataset=inputs.train,
            eval_dataset=inputs.validation,
            data_collator=collator,
            processing_class=inputs.tokenizer,
            settings=shaping_settings(experiment, args, inputs.data_sha, inputs.tokenizer_sha),
            held_out=held_out,
            statistics=ActivationKurtosis(model),
            statistics_steps=experiment.statistics_steps,
            emergence=emergence,
            packed=not experiment.padded,
        )
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(LogLines() if args.disable_tqdm else Bar())
    return trainer


def shaping_settings(
    experiment: ExperimentArguments, args: TrainingArguments, data_sha: str, tokenizer_sha: str
) -> dict:
    """The settings that determine the weights and the statistics: a run can continue only with the same ones."""
    names = (
        "softmax_n control max_length mlm_probability vocab_size config_overrides padded statistics_steps "
        "seed data_seed per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 "
        "adam_epsilon max_grad_norm optim optim_args optim_target_modules dataloader_drop_last bf16 fp16"
    ).split()
    settings = {**vars(experiment), **args.to_dict()}
    inputs = {"dataset": data_sha, "tokenizer": tokenizer_sha, "processes": args.world_size}
    return {**inputs, **{name: settings[name] for name in names}}


def refuse_other_settings(results_path: Path, experiment: ExperimentArguments, args: TrainingArguments) -> None:
    """Exit with one line if a finished run had other settings, because then it belongs to another experiment."""
    results = read_results(results_path)
    _, manifest = load_data(experiment.data_dir)
    tokenizer_sha = record.sha256(Path(experiment.tokenizer_dir) / "tokenizer.json")
    wanted = shaping_settings(experiment, args, manifest["splits"]["train"]["sha256"], tokenizer_sha)
    inputs = {"dataset": results["dataset"]["sha256"], "tokenizer": results["tokenizer"]["sha256"]}
    earlier = {**results["settings"], **inputs}  # without the number of processes, which changes no figure
    for name, value in wanted.items():
        if name in earlier and earlier[name] != value:
            sys.exit(
                f"error: {results_path} is there, of a run with {name} = {earlier[name]!r}, not {value!r}: move the "
                "results and models of the other experiment away, or give the settings that they were made with"
            )


def fit(trainer: ExperimentTrainer, checkpoint: str | None) -> Diverged | None:
    """Train to the last step. Returns how it diverged, or None. Exits if a signal stopped it earlier."""
    stop = StopWhenAsked()
    trainer.add_callback(stop)
    diverged = None
    try:
        state = None
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state is not None and state.global_step >= state.max_steps:
            # The run was interrupted after its last step. Trainer would train one more.
            trainer.state = state
            trainer.model.load_state_dict(AutoModelForMaskedLM.from_pretrained(checkpoint).state_dict())
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        diverged = error
    finally:
        stop.restore()
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        print(f"{trainer.args.run_name} stopped at step {step:,}: the same command goes on from there")
        sys.exit(128 + stop.received)
    return diverged


def saved_and_measured(
    trainer: ExperimentTrainer, experiment: ExperimentArguments, inputs: Inputs, diverged: Diverged | None
) -> Outcome:
    """Save the model unless it diverged, compare the saved files with it, and measure it. Every process calls it."""
    seconds = trainer.seconds
    if diverged is None:
        trainer.save_model()  # first, so that no later error loses the trained model
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
    return Outcome(trainer.state, counts, seconds, trainer.emerged, measured, diverged)


def saved_loss(trainer: ExperimentTrainer, held_out: list[dict], experiment: ExperimentArguments) -> tuple[float, int]:
    """(held-out loss of the saved model in nats, number of masked tokens), computed in float32.

    Exits with one line if the saved model differs from the trained one.
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
        sys.exit(f"error: the model in {args.output_dir} is not the one just trained: check the disk, and train again")
    return held_out_loss(reloaded, held_out, progress=not args.disable_tqdm)


def result_of(
    experiment: ExperimentArguments,
    args: TrainingArguments,
    invocation: dict,
    environment: dict,
    inputs: Inputs,
    description: dict,
    outcome: Outcome,
) -> dict:
    """The content of results/<run>.json; nothing is measured here.

    Args:
        invocation: {"argv", "settings"}.
        environment: {"git", "versions", "hardware"}, see record.py.
        description: of the model, from `model_of`.
    """
    step, diverged, seconds = outcome.state.global_step, outcome.diverged, outcome.seconds
    history = outcome.state.log_history
    loss_history = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation_history = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    if (loss := outcome.measured["validation"]["loss"]) is not None:
        validation_history[step] = loss
    usd_per_hour = experiment.usd_per_hour
    if usd_per_hour is None:
        usd_per_hour = USD_PER_HOUR.get(environment["hardware"]["name"])
    return {
        "run": args.run_name,
        "status": "complete" if diverged is None else "diverged",
        "diverged": None if diverged is None else {"step": diverged.step, "reason": str(diverged)},
        "softmax_n": experiment.softmax_n,
        "seed": args.seed,
        "test_pipeline": experiment.test_pipeline,
        **invocation,
        "effective_batch_size": effective_batch_size(args),
        **environment,
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "dataset": {
            "sources": [source["name"] for source in inputs.manifest["sources"]],
            "train_samples": len(inputs.train),
            "validation_samples": len(inputs.validation),
            "sha256": inputs.data_sha,
        },
        "tokenizer": {"entries": len(inputs.tokenizer), "sha256": inputs.tokenizer_sha},
        "model": description,
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


def effective_batch_size(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def mean_over_steps(loss_history: list[tuple[int, float]]) -> float:
    """Mean loss of the whole run, as published. Each entry (step, loss) is a mean over the steps since the last entry.

    Trainer's own figure lacks the steps before a resumption.
    """
    steps = np.diff([0, *(step for step, _ in loss_history)])
    return float(np.average([loss for _, loss in loss_history], weights=steps))


def remedy(error: Exception, args: TrainingArguments) -> str | None:
    """For an error of the machine, what is wrong and what to do; None for other errors.

    PyTorch raises a RuntimeError for most of them, so they are recognized by their messages.
    """
    message = record.one_line(error)
    no_memory = re.search("out of memory|t allocate memory", message)
    if no_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if size == 1:
            return f"out of memory with one sample at a time ({message}): choose a smaller model or --max_length"
        parts = next(parts for parts in range(2, size + 1) if size % parts == 0)
        return (
            f"out of memory with {size} samples at a time ({message}): --per_device_train_batch_size {size // parts} "
            f"--gradient_accumulation_steps {steps * parts} keeps the effective batch (if there are checkpoints, "
            "add --overwrite)"
        )
    if "DataLoader worker" in message:
        return (
            f"a process that makes batches has ended ({message}), often for lack of memory: give the same command "
            "again to continue from the last checkpoint; if it happens again, with a smaller --dataloader_num_workers"
        )
    if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|inline_container|iostream", message):
        return f"{args.output_dir} cannot be written ({message}): make room, and give the same command again"
    return None


def parse(argv: list[str] | None) -> tuple[ExperimentArguments, PublishedTrainingArguments]:
    """The flags, checked: see arguments.py."""
    return arguments.parse(argv, __doc__)


def main(argv: list[str] | None = None) -> None:
    experiment, args = parse(argv)
    try:
        with attention_backend(experiment.attention):
            train(experiment, args, record.command_line() if argv is None else ["train_model.py", *argv])
    except NothingToMask as error:
        sys.exit(f"error: {record.one_line(error)}")
    except (RuntimeError, MemoryError, SafetensorError) as error:
        if (advice := remedy(error, args)) is None:
            raise
        sys.exit(f"error: {advice}")


if __name__ == "__main__":
    command.run(main)
