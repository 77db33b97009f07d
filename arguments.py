"""The flags of train_model.py: ours and those of transformers' TrainingArguments, their help, and their checks."""

import argparse
import contextlib
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

import command
import record
from experiment import (
    EFFECTIVE_BATCH_SIZE,
    MAX_LENGTH,
    MLM_PROBABILITY,
    REMEDIES,
    VOCAB_SIZE,
    config_overrides,
    longest_text,
    read_softmax_n,
)
from softmax1 import BACKENDS, LEARNED, checked_softmax_n

# Flags of TrainingArguments that would have no effect here, or would break the comparison of the arms, by the reason.
# Their default values are accepted. All other flags work as transformers documents them.
REFUSED_FOR = {
    "the loss is the published cross-entropy": "label_smoothing_factor",
    "the loss is the mean over the masked tokens of the whole batch": "average_tokens_across_devices",
    "its noise would depend on how a batch is packed": "neftune_noise_alpha",
    "a loss that is not a finite number is a result, and ends the run": "logging_nan_inf_filter",
    "the samples come in the published, shuffled order": (
        "train_sampling_strategy group_by_length length_column_name dataloader_in_order"
    ),
    "a run that continues gets the samples that it would have got without the interruption": "ignore_data_skip",
    "every process makes the whole batch and keeps its share of it": "accelerator_config",
    "this script does not use it": (
        "dataloader_persistent_workers dataloader_multiprocessing_context torch_empty_cache_steps"
    ),
    "the tokenized dataset has one column": "remove_unused_columns",
    "the labels are the masked tokens": "label_names",
    "the batch size is a setting of the experiment": "auto_find_batch_size",
    "it has no kernels for this model": "use_liger_kernel liger_kernel_config",
    "a masked language model has no cache": "use_cache",
    "the model fits on one device; several processes share the batch (torchrun)": (
        "fsdp fsdp_config deepspeed parallelism_config"
    ),
    "the held-out loss is that of the weights in float32": "bf16_full_eval fp16_full_eval",
    "the held-out loss is all that is evaluated": (
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps do_predict"
    ),
    "the arms are compared by their last models": "load_best_model_at_end metric_for_best_model greater_is_better",
    "a run must be able to continue from its checkpoints": "save_only_model",
    "the first process writes the checkpoints": "save_on_each_node",
    "Ctrl-C and SIGTERM write a checkpoint without it": "enable_jit_checkpoint",
    "a checkpoint contains all that is needed without it": "restore_callback_states_from_checkpoint",
    "the name of a run consists of its arm and its seed": "run_name",
    "other users can read a command line: put HUGGINGFACE_TOKEN into .env instead": "hub_token",
    "a model is pushed to <HUGGINGFACE_USER>/<run>": "hub_model_id",
    "the finished model is pushed, once": "hub_strategy hub_always_push hub_revision",
}
REFUSED = {name: reason for reason, names in REFUSED_FOR.items() for name in names.split()}
# Optimizers that need another training loop, and those that use --optim_args or --optim_target_modules.
REFUSED_OPTIMIZERS = re.compile(r"lomo|adalomo|schedule_free_\w+|\w+_layerwise")
TAKES_NO_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor")
TAKES_TARGET_MODULES = ("galore_", "apollo_")

TAKE_JSON = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")

# The possible values of numbers: {(lowest, below): flags}. NaN is outside every range.
MANY = 1 << 31
BOUNDS = {
    (0, 1 << 32): "seed data_seed",  # the range of numpy's seeds
    (1, MANY): (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "dataloader_prefetch_factor ddp_timeout statistics_steps max_eval_samples"
    ),
    (-1, MANY): "max_steps",
    (0, MANY): "num_train_epochs warmup_steps logging_steps eval_steps save_steps eval_delay",
    (0, math.inf): "learning_rate weight_decay adam_epsilon max_grad_norm usd_per_hour",
    (0, 1): "adam_beta1 adam_beta2",
    (0, 1 << 10): "dataloader_num_workers",
}

# The flags in --help, in this order; --help_all shows the others too.
HELP = {
    "the model": "softmax_n use_softmax1 control seed config_overrides vocab_size",
    "input and output": (
        "data_dir tokenizer_dir output_dir results_dir overwrite resume_from_checkpoint push_to_hub hub_private_repo "
        "usd_per_hour"
    ),
    "the text": "max_length mlm_probability max_eval_samples",
    "the training": (
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
        "lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 max_grad_norm optim"
    ),
    "the computation": "padded attention statistics_steps bf16 torch_compile use_cpu dataloader_num_workers",
    "log and checkpoints": "logging_steps eval_steps save_steps report_to disable_tqdm",
    "a first try": "test_pipeline",
}
HELP = {title: names.split() for title, names in HELP.items()}
# Shorter texts for flags of TrainingArguments.
WORDS = {
    "seed": "seed of the weights, the order of the samples, their masks, and dropout",
    "resume_from_checkpoint": "checkpoint to continue from (the newest of this run)",
    "push_to_hub": "push the finished model to the Hub",
    "hub_private_repo": "push it to a private repository",
    "num_train_epochs": "passes over the data",
    "max_steps": "number of updates, instead of epochs; -1: use epochs",
    "gradient_accumulation_steps": "batches in an update",
    "learning_rate": "highest learning rate",
    "lr_scheduler_type": "how the learning rate decreases: linear, cosine, constant or another schedule",
    "warmup_steps": "updates in which the learning rate rises from 0; below 1: as a share of all updates",
    "weight_decay": "of all weights except biases and LayerNorms (0)",
    "max_grad_norm": "norm to which gradients are clipped; 0: no clipping",
    "optim": "optimizer",
    "bf16": "compute in bfloat16, with weights in float32",
    "torch_compile": "compile the model",
    "use_cpu": "train on the CPU even if there is a GPU",
    "dataloader_num_workers": "processes that prepare batches",
    "logging_steps": "updates between two entries in the log",
    "eval_steps": "updates between two held-out losses",
    "save_steps": "updates between two checkpoints",
    "report_to": "tensorboard, trackio, wandb or another tracker, for losses, kurtosis, null mass and sinks",
    "disable_tqdm": "print lines instead of a progress bar (the default outside a terminal)",
}

# The defaults that --test_pipeline changes.
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


def _flag(default, text: str, **metadata):
    """A field of a dataclass that becomes a flag with this help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ExperimentArguments:
    """The settings of the experiment, and the places of its files."""

    softmax_n: str | None = _flag(None, "n >= 0 (0: softmax), or learned: a trained n for each head", metavar="N")
    use_softmax1: bool = _flag(False, "short for --softmax_n 1")
    control: str | None = _flag(
        None, "a published remedy instead of softmax_n (see controls.py)", choices=list(REMEDIES)
    )
    test_pipeline: bool = _flag(False, "tiny numbers, the embedded sample, files in scratch/")
    data_dir: str = _flag("data", "dataset of build_dataset.py")
    tokenizer_dir: str = _flag("tokenizer", "tokenizer of train_tokenizer.py")
    results_dir: str = _flag("results", "folder of <run>.json")
    overwrite: bool = _flag(False, "replace a run that is complete, or has other settings")
    padded: bool = _flag(
        False, "the published computation: padded batches, logits of every token; same loss, much slower"
    )
    attention: str = _flag(
        "auto", "kernel of softmax_n attention; auto: by device and mask (docs/softmax_n.md)", choices=list(BACKENDS)
    )
    statistics_steps: int = _flag(10, "steps between measurements of the activations' kurtosis; published: 1")
    max_length: int = _flag(MAX_LENGTH, "the most tokens of a sample; longer ones are cut off")
    mlm_probability: float = _flag(MLM_PROBABILITY, "share of the tokens that are masked, 80/10/10")
    vocab_size: int = _flag(VOCAB_SIZE, "rows of the embedding, at least the entries of the tokenizer")
    max_eval_samples: int | None = _flag(None, "number of held-out samples, evenly spread (all)")
    config_overrides: str = _flag("", 'another size: "num_hidden_layers=4,hidden_size=256,..." (of RobertaConfig)')
    usd_per_hour: float | None = _flag(None, "price of this machine, for the cost; that of an A10G is known")

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
        # Always written in the same way, so that settings can be compared.
        self.config_overrides = ",".join(f"{key}={value}" for key, value in overrides.items())
        positions = longest_text(overrides)
        if not 3 <= self.max_length <= positions:
            raise ValueError(f"--max_length must lie between 3 and the model's {positions} positions")


@dataclass
class PublishedTrainingArguments(TrainingArguments):
    """TrainingArguments with the published settings as defaults.

    The other defaults are those of transformers, which the published run used too: AdamW with learning rate 5e-5, betas
    (0.9, 0.999), eps 1e-8 and no weight decay, linear decay without warm-up, clipping at 1.0, float32, seed 42.
    """

    output_dir: str = _flag("models/<run>", "folder of the model")
    num_train_epochs: float = field(default=1.0)
    # The published run started with 128, ran out of memory, and halved the batch until 16 fitted. Here the 16 are
    # divided among the processes and accumulation steps.
    per_device_train_batch_size: int | None = _flag(
        None, "samples in a batch of one process (16 divided among all processes)"
    )
    per_device_eval_batch_size: int = field(default=16)
    logging_steps: float = field(default=1_000)
    logging_first_step: bool = field(default=True)
    logging_nan_inf_filter: bool = field(default=False)  # it would hide a NaN in the mean of the losses
    eval_strategy: str = field(default="steps")
    eval_steps: float | None = field(default=10_000)
    save_steps: float = field(default=10_000)
    save_total_limit: int | None = field(default=1)
    report_to: str | None = field(default="none")
    ddp_find_unused_parameters: bool | None = field(default=False)  # every parameter is used
    # A GPU needs less time for a batch than one process needs to mask and pack it.
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


# ----------------------------------------------------------------------------------------------------------- the parser


class Parser(command.Parser, HfArgumentParser):
    """A parser of all flags. --help shows those of HELP, --help_all the others too."""

    def __init__(self, description: str):
        types = (ExperimentArguments, PublishedTrainingArguments)
        super().__init__(dataclass_types=types, description=description, add_help=False)
        self.add_argument("-h", "--help", action="help", help="show the most important flags, and exit")
        self.add_argument("--help_all", action=HelpAll, help="show the other flags of TrainingArguments, too")

    def format_help(self, everything: bool = False) -> str:
        actions = {action.option_strings[0]: action for action in self._actions}
        text = argparse.RawDescriptionHelpFormatter(self.prog, max_help_position=36)
        text.add_usage("%(prog)s [flags]", [], [])
        text.add_text(self.description)
        groups = {title: [f"--{name}" for name in names] for title, names in HELP.items()}
        groups["help"] = ["-h", "--help_all"]
        if everything:
            shown = {flag for flags in groups.values() for flag in flags}
            others = [flag for flag, action in actions.items() if flag not in shown and action.dest not in REFUSED]
            groups["the other flags of TrainingArguments"] = others
        for title, flags in groups.items():
            text.start_section(title)
            text.add_arguments([readable(actions[flag]) for flag in flags])
            text.end_section()
        if everything:
            reasons = [f"  --{name}: {why}" for name, why in REFUSED.items() if f"--{name}" in actions]
            text.add_text("refused, without effect here or not comparable:\n" + "\n".join(reasons))
        return text.format_help()


class HelpAll(argparse.Action):
    """Prints the help with all flags, and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *rest):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def readable(action: argparse.Action) -> argparse.Action:
    """A flag as the help shows it: one spelling, one sentence, and its default."""
    shown = copy.copy(action)
    shown.option_strings = [text for text in action.option_strings if "-" not in text[2:]]
    if action.nargs == "?":  # "--padded" and "--padded True" mean the same
        shown.nargs = 0
    elif action.choices is None or len(list(action.choices)) > 6:
        shown.metavar = action.metavar or {int: "N", float: "X"}.get(action.type, "TEXT")
    first_sentence = " ".join((action.help or "").split()).partition(". ")[0].rstrip(".")
    default = action.default
    if isinstance(default, (list, dict)) or default in (None, "", False, argparse.SUPPRESS):
        default = ""
    shown.help = WORDS.get(action.dest, first_sentence)
    shown.help += f" ({getattr(default, 'value', default)})" if default != "" else ""
    shown.help = shown.help.replace("%", "%%")
    return shown


def parse(argv: list[str] | None, description: str) -> tuple[ExperimentArguments, PublishedTrainingArguments]:
    """The flags, checked. Exits with one line if no training is possible with them, or they are misleading."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description)
    parser.set_defaults(use_cpu=None)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        # Only the name of the flag: its value could be a secret.
        name = command.without_secrets(unknown[0].split("=")[0])
        sys.exit(f"error: unknown argument: {name} (see python train_model.py --help)")
    for name, why in REFUSED.items():
        if name in given and getattr(given, name) != parser.get_default(name):
            sys.exit(f"error: --{name} is not for this script: {why}")
    check_numbers(given)
    check_device(given.use_cpu)
    # Trainer refuses bfloat16 on a CPU unless use_cpu is set.
    parser.set_defaults(use_cpu=not usable_gpu(), disable_tqdm=not sys.stderr.isatty())
    if given.test_pipeline:
        parser.set_defaults(**TEST_PIPELINE)
    try:
        experiment, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # TrainingArguments raises many kinds of errors for what this machine cannot do
        sys.exit(f"error: {record.one_line(error)}")
    check_choices(experiment, args)
    return experiment, args


# ----------------------------------------------------------------------------------------------------------- the checks


@contextlib.contextmanager
def refused(flag: str) -> Iterator[None]:
    """Exit with one line that names the flag if the block fails.

    transformers fails for missing packages and for unsuitable arguments, with many kinds of errors.
    """
    try:
        yield
    except Exception as error:
        sys.exit(f"error: {flag}: {record.one_line(error)}")


def check_numbers(given: argparse.Namespace) -> None:
    """Exit with one line if a number is impossible for every training."""
    for (lowest, below), names in BOUNDS.items():
        for name in names.split():
            value = getattr(given, name, None)
            if value is not None and not lowest <= value < below:
                limits = f"from {lowest} on" if below == math.inf else f"from {lowest} to below {below}"
                got = f"{value:g}" if isinstance(value, float) else str(value)[:24]
                sys.exit(f"error: --{name} must be a number {limits}, got {got}")
    for name in TAKE_JSON:
        text = getattr(given, name, None)
        with refused(f"--{name} needs a JSON object"):
            if text is not None and not isinstance(json.loads(text), dict):
                raise ValueError(text)
    if given.max_steps == 0:
        sys.exit("error: --max_steps must be at least 1, or -1 for whole epochs, got 0")
    if given.max_steps < 0 and given.num_train_epochs == 0:
        sys.exit("error: --num_train_epochs must be above 0, got 0")
    for event in ("logging", "eval", "save"):
        if getattr(given, f"{event}_steps") == 0:
            sys.exit(f"error: --{event}_steps must be above 0; to switch it off, give --{event}_strategy no")


def check_choices(experiment: ExperimentArguments, args: PublishedTrainingArguments) -> None:
    """Exit with one line if flags contradict each other or are not supported, or if a tracker is not installed."""
    if args.save_strategy == "best":
        sys.exit("error: --save_strategy best: the arms are compared by their last models")
    if experiment.overwrite and args.resume_from_checkpoint:
        sys.exit("error: --overwrite starts again, which contradicts --resume_from_checkpoint: give one of them")
    optimizer = args.optim.value
    if REFUSED_OPTIMIZERS.fullmatch(optimizer):
        sys.exit(f"error: --optim {optimizer} needs a training loop of its own: choose another")
    if args.optim_args and optimizer in TAKES_NO_ARGUMENTS:
        sys.exit(f"error: --optim {optimizer} does not use --optim_args: leave them out")
    if args.optim_target_modules and not optimizer.startswith(TAKES_TARGET_MODULES):
        sys.exit(f"error: --optim {optimizer} does not use --optim_target_modules: leave them out")
    for tracker in args.report_to:
        with refused(f"--report_to {tracker}"):
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()


def check_device(use_cpu: bool | None) -> None:
    """Exit with one line if a GPU is asked for or present, but the training cannot use it."""
    if usable_gpu() or use_cpu:
        return
    if use_cpu is not None:
        why = "the statistics need float64, which Apple's GPUs lack" if has_mps() else "PyTorch finds no GPU here"
        sys.exit(f"error: --use_cpu False, but {why}")
    if gpu := visible_gpu():
        sys.exit(
            f"error: {gpu}, which PyTorch {torch.__version__} cannot use: install a PyTorch for its CUDA driver, or "
            "give --use_cpu to train on the CPU"
        )


def has_mps() -> bool:
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "mps"


def usable_gpu() -> bool:
    """Whether PyTorch has an accelerator that computes in float64, as the statistics need. Apple's does not."""
    return torch.accelerator.is_available() and not has_mps()


def visible_gpu() -> str | None:
    """In words, where a GPU is visible: to nvidia-smi, or in CUDA_VISIBLE_DEVICES. None if there is none, or hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return None
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
            if first := re.search(r"^GPU 0: (.*?)(?: \(|$)", listed, re.MULTILINE):
                return f"nvidia-smi sees {first[1]}"
    if visible and re.match(r"\d|GPU-|MIG-", visible):
        return f"CUDA_VISIBLE_DEVICES={visible} names a GPU"
    return None
