"""Train one arm of the experiment: RoBERTa with softmax_n attention, on data/ with tokenizer/, from random weights.

    python train_model.py                       softmax, the published settings
    python train_model.py --use_softmax1        softmax1, the same batches, masks and initial weights
    python train_model.py --softmax_n 0.5 --seed 43
    python train_model.py --test_pipeline       the whole path in a minute or two, on the embedded sample, in scratch/
    python train_model.py --push_to_hub         and push model, tokenizer and card in the end (see hub.py)

Reads data/ (build_dataset.py) and tokenizer/ (train_tokenizer.py). Writes models/<run>/ (model and tokenizer) and
results/<run>.json (record.py says with what). An interrupted run goes on from its last checkpoint when the same command
is given again. Every flag of transformers' TrainingArguments works; the defaults are the published experiment's.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, load_from_disk
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hub
import record
from outliers import ActivationKurtosis, weight_excess_kurtosis
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, checked_softmax_n

# The published architecture; with a vocabulary of 52,032 it has 84M parameters. 514 positions are 512 tokens, because
# RoBERTa counts them from padding_idx + 1 = 2.
ARCHITECTURE = {"num_hidden_layers": 6, "max_position_embeddings": 514, "type_vocab_size": 1}

HELD_OUT_SEED = 0  # of the masks of the held-out text: the same for every run, so that runs compare

# USD an hour of the machine that the GPU was rented in: AWS g5.2xlarge, as the published run paid it.
USD_PER_HOUR = {"NVIDIA A10G": 1.212}

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
    test_pipeline: bool = field(default=False, metadata={"help": "tiny numbers, embedded sample, files in scratch/"})
    data_dir: str = field(default="data", metadata={"help": "dataset of build_dataset.py"})
    tokenizer_dir: str = field(default="tokenizer", metadata={"help": "tokenizer of train_tokenizer.py"})
    results_dir: str = field(default="results", metadata={"help": "where <run>.json goes"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a run that is complete, or one with other settings"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of a sample at most; the rest is cut off"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are masked (80/10/10)"})
    vocab_size: int = field(default=52_032, metadata={"help": "rows of the embedding; >= the tokenizer's entries"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "N held-out samples, evenly spread (default: all)"}
    )
    usd_per_hour: float | None = field(default=None, metadata={"help": "price of this machine, for the cost"})

    def __post_init__(self):
        if self.use_softmax1 and self.softmax_n not in (None, 1):
            raise ValueError(f"--use_softmax1 means --softmax_n 1, which contradicts --softmax_n {self.softmax_n:g}")
        self.softmax_n = checked_softmax_n(1.0 if self.use_softmax1 else self.softmax_n or 0.0)
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability:g}")
        positions = ARCHITECTURE["max_position_embeddings"] - 2
        if not 3 <= self.max_length <= positions:
            raise ValueError(f"--max_length must lie between 3 and the model's {positions} positions")
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
    # The published run asked for 128, ran out of memory and was halved to 16. Ours is 16 on purpose.
    per_device_train_batch_size: int = field(default=16)
    per_device_eval_batch_size: int = field(default=16)
    logging_steps: float = field(default=1_000)
    logging_first_step: bool = field(default=True)
    logging_nan_inf_filter: bool = field(default=False)  # a NaN is to be seen, not averaged away
    eval_strategy: str = field(default="steps")
    eval_steps: float | None = field(default=10_000)
    save_steps: float = field(default=10_000)
    save_total_limit: int | None = field(default=1)
    report_to: str | None = field(default="none")


# --------------------------------------------------------------------------------------------------- data and masks


def load_data(path: str) -> tuple[DatasetDict, dict]:
    """The dataset of build_dataset.py and its manifest. Exits with one line when there is none."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
        data = load_from_disk(path)
        data["train"], data["validation"], manifest["splits"]["train"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {path} holds no whole dataset ({record.one_line(error)}): run build_dataset.py first")
    return data, manifest


def load_tokenizer(path: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of train_tokenizer.py. Exits with one line when there is none or it does not fit."""
    if not (Path(path) / "tokenizer.json").is_file():
        sys.exit(f"error: {path} holds no tokenizer: run train_tokenizer.py first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception of the tokenizers library
        sys.exit(
            f"error: the tokenizer in {path} cannot be read ({record.one_line(error)}): run train_tokenizer.py again"
        )
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id != 1:
        sys.exit(f"error: the tokenizer in {path} needs a <mask> token and <pad> as id 1, as RoBERTa has them")
    if len(tokenizer) > vocab_size:
        sys.exit(f"error: the tokenizer has {len(tokenizer):,} entries, more than --vocab_size {vocab_size:,}")
    return tokenizer


def tokenized(data: DatasetDict, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """The dataset as `input_ids`, from `folder` if it is there already: it is tokenized once for all runs.

    Args:
        data: splits with a `text` column, one sample a row.
        folder: where the tokenized dataset lies or will lie; its name must tell data, tokenizer and length apart.
        tokenizer: adds <s> and </s>.
        max_length: tokens of a sample at most, <s> and </s> included.
    """
    if not folder.exists():

        def tokenize(batch: dict) -> dict:
            encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, return_attention_mask=False)
            return {"input_ids": encoded["input_ids"]}

        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        cache = {split: str(partial / "cache" / f"{split}.arrow") for split in data}
        (partial / "cache").mkdir(parents=True)
        result = data.map(tokenize, batched=True, remove_columns=["text"], cache_file_names=cache, desc="Tokenizing")
        result.save_to_disk(partial)
        shutil.rmtree(partial / "cache")
        partial.rename(folder)
    return load_from_disk(folder)


class SeededMaskingCollator(DataCollatorForLanguageModeling):
    """transformers' 80/10/10 masking, with masks that depend on `seed` and the batch's own tokens alone.

    So two arms see the same masks whatever random numbers their attention draws, in any number of loader workers, and
    after resuming in the middle. The same sample meets other masks in another epoch, because its batch is another.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        digest = np.random.SeedSequence([self.seed, *(token for example in examples for token in example["input_ids"])])
        self.generator = torch.Generator().manual_seed(int(digest.generate_state(1, np.uint64)[0] >> 1))
        # A batch without a masked token has no loss: its mean over nothing is NaN and would poison the weights. It
        # happens to the last, short batch of an epoch now and then; draw again.
        for _ in range(1_000):
            batch = super().torch_call(examples)
            if (batch["labels"] != -100).any():
                return batch
        raise ValueError("a batch holds nothing but special tokens, so nothing can be masked: look at the data")


def held_out_batches(dataset: Dataset, collator: SeededMaskingCollator, batch_size: int) -> list[dict]:
    """Masked and padded batches, the same for every run: a sample's masks depend on nothing but the sample."""
    samples = [collator([{"input_ids": ids}]) for ids in sorted(dataset["input_ids"], key=len)]
    pad = collator.tokenizer.pad_token_id
    batches = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]

        def stack(name: str, fill: int, chosen: list = chosen) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([sample[name][0] for sample in chosen], True, fill)

        batch = {"input_ids": stack("input_ids", pad), "labels": stack("labels", -100)}
        batches.append({**batch, "attention_mask": stack("attention_mask", 0)})
    return batches


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: list[dict], progress: bool = False) -> tuple[float, int]:
    """(mean cross-entropy in nats over all masked tokens, their number), in eval mode."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    count = 0
    for batch in tqdm(batches, desc="Held-out loss", leave=False, disable=not progress):
        masked = int((batch["labels"] != -100).sum())
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        total += loss.double() * masked
        count += masked
    model.train(training)
    return total.item() / count, count


# -------------------------------------------------------------------------------------------------------- the model


def build_model(softmax_n: float, vocab_size: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """RoBERTa with random weights that depend on `seed` alone: arms with the same seed start from the same point.

    n = 0 is the stock class, so that a softmax model needs none of our code.
    """
    settings = {
        "vocab_size": vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **ARCHITECTURE,
    }
    set_seed(seed)
    if softmax_n == 0:
        model = RobertaForMaskedLM(RobertaConfig(softmax_n=0.0, **settings))  # stock RoBERTa ignores the field
    else:
        model = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=softmax_n, **settings))
    # Its loss is the mean over the batch's own masked tokens. Otherwise Trainer takes its **kwargs for the promise to
    # divide by the number of tokens it is told, and would not divide by the accumulation steps itself.
    model.accepts_loss_kwargs = False
    return model


class ExperimentTrainer(Trainer):
    """Trainer that counts tokens, gathers the published statistics and knows our held-out loss."""

    def __init__(self, *args, held_out: list[dict], statistics: ActivationKurtosis, **kwargs):
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self.statistics = statistics
        self.tokens = 0  # real ones; a tensor on the device once training has begun, so that nothing waits for it
        self.padded_tokens = 0
        self.samples = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        self.tokens = self.tokens + inputs["attention_mask"].sum()
        self.padded_tokens += inputs["attention_mask"].numel()
        self.samples += inputs["attention_mask"].shape[0]
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.statistics.active = False
        loss, _ = held_out_loss(self.model, self.held_out, progress=not self.args.disable_tqdm)
        self.statistics.active = True
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Bookkeeping(TrainerCallback):
    """Keeps in every checkpoint what the run's record needs, and stops a run whose loss is no number any more."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.trainer: ExperimentTrainer | None = None
        self.seconds_before = 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all its sessions."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:  # so that the last, shorter window of the loss is logged too
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        trainer = self.trainer
        progress = {
            "settings": self.settings,
            "seconds": self.seconds,
            "tokens": int(trainer.tokens),
            "padded_tokens": trainer.padded_tokens,
            "samples": trainer.samples,
            "activation_kurtosis": trainer.statistics.state(),
        }
        record.write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "progress.json", progress)

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
        self.trainer.tokens = progress["tokens"]
        self.trainer.padded_tokens = progress["padded_tokens"]
        self.trainer.samples = progress["samples"]
        self.trainer.statistics.load_state(progress["activation_kurtosis"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                sys.exit(f"error: {name} is {logs[name]} at step {state.global_step}: lower --learning_rate")


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
        "dataset": data_sha,
        "tokenizer": tokenizer_sha,
        "max_length": experiment.max_length,
        "mlm_probability": experiment.mlm_probability,
        "vocab_size": experiment.vocab_size,
        "processes": args.world_size,
        **{name: getattr(args, name) for name in names},
    }


def last_checkpoint(folder: str) -> str | None:
    """The last checkpoint in `folder`, read once in full to be sure that it can be. Exits when it is damaged."""
    checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if checkpoint is None:
        return None
    try:
        (Path(checkpoint) / "progress.json").read_text(encoding="utf-8")
        AutoModelForMaskedLM.from_pretrained(checkpoint)
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
    except Exception as error:  # half-written archives fail in as many ways as there are formats
        sys.exit(f"error: {checkpoint} is damaged ({record.one_line(error)}): delete that folder and start again")
    return checkpoint


# -------------------------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[ExperimentArguments, PublishedTrainingArguments]:
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        (ExperimentArguments, PublishedTrainingArguments), description=__doc__.split("\n")[0], allow_abbrev=False
    )
    if "--test_pipeline" in argv:
        parser.set_defaults(**TEST_PIPELINE)
    try:
        experiment, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # how TrainingArguments refuses settings that this machine cannot run
        sys.exit(f"error: {record.one_line(error)}")
    if args.hub_token is not None:  # would also be pickled into training_args.bin beside the model
        sys.exit("error: a token on the command line is read by others: put HUGGINGFACE_TOKEN into .env instead")
    if args.hub_model_id is not None:
        sys.exit("error: --hub_model_id is not for this script: a model goes to <HUGGINGFACE_USER>/<run>")
    if unknown:
        # The flag alone: its value may be a secret that belonged to another flag.
        sys.exit(f"error: unknown argument: {unknown[0].split('=')[0]} (see python train_model.py --help)")
    return experiment, args


def run_name(softmax_n: float, seed: int) -> str:
    """esperberto-softmax1, with the seed behind it when it is not the published 42."""
    return f"esperberto-softmax{softmax_n:g}" + ("" if seed == 42 else f"-seed{seed}")


def mean_over_steps(loss_history: list[tuple[int, float]]) -> float:
    """Mean loss of the whole run, as published. Each entry is the mean over the steps since the one before it.

    Trainer's own figure forgets the steps before a resumption.
    """
    steps = np.diff([0, *(step for step, _ in loss_history)])
    return float(np.average([loss for _, loss in loss_history], weights=steps))


def build_test_inputs(data_dir: str, tokenizer_dir: str) -> None:
    """A dataset of the embedded sample and a small tokenizer, for --test_pipeline on a fresh clone."""
    here = Path(__file__).parent
    for script, folder, flags in (
        ("build_dataset.py", data_dir, ["--sample", "--validation_fraction", "0.1"]),
        ("train_tokenizer.py", tokenizer_dir, ["--data_dir", data_dir, "--vocab_size", "2048"]),
    ):
        if not Path(folder).exists():
            command = [sys.executable, str(here / script), "--output_dir", folder, *flags]
            if (status := subprocess.run(command).returncode) != 0:
                sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    experiment, args = parse(argv)
    transformers.logging.set_verbosity_warning()
    datasets.logging.set_verbosity_warning()
    run = run_name(experiment.softmax_n, args.seed)
    args.output_dir = args.output_dir.replace("<run>", run)
    args.run_name = run
    results_path = Path(experiment.results_dir) / f"{run}.json"
    if results_path.exists() and not experiment.overwrite:
        sys.exit(
            f"error: {run} is complete ({results_path} is there): move it away, or pass --overwrite to train again"
        )
    if args.n_gpu > 1:
        sys.exit(f"error: {args.n_gpu} GPUs are visible but one process drives one: set CUDA_VISIBLE_DEVICES=0")
    # Pushing is the last thing done here. Trainer would push during training, with transformers' own card.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    if push_to_hub:
        hub.check()
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
        spread = np.linspace(0, len(validation) - 1, min(experiment.max_eval_samples, len(validation)))
        validation = validation.select(spread.astype(int))  # over all sources, which lie one behind the other

    model = build_model(experiment.softmax_n, experiment.vocab_size, tokenizer, args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    # A checkpoint holds the weights and two moments; the old one goes only when the new one is whole. Then the model.
    needed = parameters * 4 * (3 + 3 + 1)
    if shutil.disk_usage(args.output_dir).free < needed:
        sys.exit(
            f"error: {args.output_dir} needs {needed / 1e9:.1f} GB for checkpoints and model, but the disk has less"
        )

    if experiment.overwrite:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)

    held_out = held_out_batches(
        validation,
        SeededMaskingCollator(tokenizer, mlm_probability=experiment.mlm_probability, seed=HELD_OUT_SEED),
        args.per_device_eval_batch_size,
    )
    statistics = ActivationKurtosis(model)
    settings = shaping_settings(experiment, args, data_sha, tokenizer_sha)
    bookkeeping = Bookkeeping(settings)
    trainer = ExperimentTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=validation,
        data_collator=SeededMaskingCollator(tokenizer, mlm_probability=experiment.mlm_probability, seed=args.seed),
        processing_class=tokenizer,
        callbacks=[bookkeeping],
        held_out=held_out,
        statistics=statistics,
    )
    bookkeeping.trainer = trainer
    if checkpoint is not None:
        bookkeeping.restore(checkpoint)
        print(f"Going on from {checkpoint}")
    effective_batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    print(
        f"{run}: {parameters:,} parameters, {len(data['train']):,} samples, effective batch {effective_batch_size}, "
        f"{len(tokenizer):,} of {experiment.vocab_size:,} vocabulary rows in use"
    )

    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = bookkeeping.seconds
    statistics.remove()

    trainer.save_model()  # first of all: nothing below may cost the trained model
    reloaded = AutoModelForMaskedLM.from_pretrained(args.output_dir).to(model.device)
    loss, masked_tokens = held_out_loss(model, held_out, progress=not args.disable_tqdm)
    if held_out_loss(reloaded, held_out[:1]) != held_out_loss(model, held_out[:1]):
        sys.exit(
            f"error: the model in {args.output_dir} does not give the logits of the one just trained: keep both logs"
        )

    step = trainer.state.global_step
    history = trainer.state.log_history
    loss_history = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation_history = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry} | {step: loss}
    hardware = record.hardware(model.device)
    usd_per_hour = experiment.usd_per_hour or USD_PER_HOUR.get(hardware["name"])
    result = {
        "run": run,
        "softmax_n": experiment.softmax_n,
        "seed": args.seed,
        "test_pipeline": experiment.test_pipeline,
        "argv": record.command_line() if argv is None else ["train_model.py", *argv],
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
        "model": {"path": args.output_dir, "parameters": parameters},
        "training": {
            "steps": step,
            "samples": trainer.samples,
            "tokens": int(trainer.tokens),
            "padded_tokens": trainer.padded_tokens,
            "wall_seconds": seconds,
            "cost_usd": None if usd_per_hour is None else seconds / 3600 * usd_per_hour,
            "loss_mean": mean_over_steps(loss_history),
        },
        "loss_history": loss_history,
        "validation_loss_history": sorted(validation_history.items()),
        "validation": {
            "loss": loss,
            "perplexity": math.exp(loss),
            "masked_tokens": masked_tokens,
            "samples": len(validation),
        },
        "weight_excess_kurtosis": weight_excess_kurtosis(model),
        "activation_excess_kurtosis": statistics.result(),
    }
    record.write_json(results_path, result)
    for old in Path(args.output_dir).glob("checkpoint-*"):  # they served to resume; the run is complete
        shutil.rmtree(old)
    print(
        f"{run}: {step} steps in {seconds:.0f} s, mean training loss {mean_over_steps(loss_history):.4f}, "
        f"held-out loss {loss:.4f} over {masked_tokens:,} masked tokens\n"
        f"model: {args.output_dir}\nresult: {results_path}"
    )
    if push_to_hub:
        hub.push(args.output_dir, results_path, private=bool(args.hub_private_repo))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {record.one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
