"""The training loop: transformers' Trainer with our batches, loss, statistics, checkpoints and log."""

import contextlib
import math
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler
from transformers import ProgressCallback, Trainer, TrainerCallback

import record
from arguments import refused
from checkpoints import delete_checkpoints, read_progress, seal
from held_out import held_out_loss
from kurtosis import ActivationKurtosis
from outliers import Emergence
from packing import on_device, summed_loss
from softmax1 import learned_sinks
from tables import duration


class Diverged(Exception):
    """A loss is NaN or infinite: the run ends, and this is its result."""

    def __init__(self, name: str, value: float, step: int):
        super().__init__(f"{name} is {value} at step {step}")
        self.step = step


class ExperimentTrainer(Trainer, TrainerCallback):
    """Trainer with our batches, loss and held-out loss. It counts tokens, measures the statistics, and is a callback of
    its own: a checkpoint contains what a run needs to continue, and a loss that is not finite raises Diverged.

    Every process makes the whole batch and keeps its share, so masks and loss do not depend on the number of processes.

    Args, in addition to those of Trainer:
        settings: those that determine the weights; a run continues only with the same ones.
        held_out: batches of the held-out text.
        statistics: of the activations, measured every `statistics_steps` steps.
        emergence: measures outliers before the first update, and whenever the training loss is logged.
        packed: whether the batches are packed.
    """

    def __init__(
        self,
        *args,
        settings: dict,
        held_out: list[dict],
        statistics: ActivationKurtosis,
        statistics_steps: int,
        emergence: Emergence,
        packed: bool,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.held_out = held_out
        self.statistics = statistics
        self.statistics_steps = statistics_steps
        self.emergence = emergence
        self.packed = packed
        # Counts of all processes, except padded_tokens: those of this process, which `counts` adds up.
        self.samples = self.tokens = self.padded_tokens = 0
        self.emerged: list[dict[str, float]] = []  # see `watch`
        self.seconds_before = 0.0  # wall time of earlier sessions
        self.started = time.monotonic()
        self.window: tuple[int, list[float]] | None = None  # step of the last log entry, and losses since by process
        self.add_callback(self)

    # ------------------------------------------------------------------------------------------- batches, loss, update

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
        # accelerate's seeded shuffling, which can resume, but without dividing the batches among the processes.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prepare_data_loader(loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = on_device(inputs, self.args.device)
        self.samples += inputs["samples"]
        self.tokens += inputs["tokens"]
        self.padded_tokens += inputs["input_ids"].numel()
        if not model.training:  # Trainer calls train() in every step, which iterates over all modules
            model.train()
        measured = contextlib.nullcontext()
        if self.state.global_step % self.statistics_steps == 0:
            # A compiled model has no hooks; the model that was compiled computes the same.
            model = getattr(model, "_orig_mod", model)
            self.statistics.packed = inputs if self.packed else None
            measured = self.statistics
        with measured:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model):
        # Trainer's method iterates over all modules of the model twice in every step to find the parameters.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, _ = summed_loss(model, inputs)
        # The gradients are averaged over the processes, which gives the mean over the masked tokens of the whole batch.
        return loss * (self.args.world_size / inputs["masked_tokens"])

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's estimate iterates over all parameters in every step, and nothing here uses it

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        loss, _ = held_out_loss(self.model, self.held_out, progress=not self.args.disable_tqdm)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model) -> list[str]:
        sinks = learned_sinks(model)  # weight decay would pull every n to 1
        return [name for name in super().get_decay_parameter_names(model) if name not in sinks]

    def create_optimizer(self, *args, **kwargs):
        with refused(f"--optim {self.args.optim.value}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        with refused(f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"):
            return super().create_scheduler(*args, **kwargs)

    # ------------------------------------------------------------------------------------------- log and measurements

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all its sessions."""
        return self.seconds_before + time.monotonic() - self.started

    def counts(self) -> dict[str, int]:
        """Samples and tokens so far, over all processes. Every process has to call it."""
        padded_tokens = self.accelerator.reduce(torch.tensor(self.padded_tokens, device=self.args.device), "sum")
        return {"samples": self.samples, "tokens": self.tokens, "padded_tokens": int(padded_tokens)}

    def watch(self) -> dict[str, float]:
        """Measure the outliers of the current model, by names that trackers group with the held-out loss."""
        values = self.emergence(self.model)
        self.emerged.append({"step": self.state.global_step, **values})
        return {f"eval_{name}": value for name, value in values.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the outliers next to every training loss, so that --report_to draws them too."""
        if math.isfinite(logs.get("loss", math.nan)):
            logs |= self.watch()
        super().log(logs, start_time)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        if state.global_step == 0:
            self.emerged = []
            self.log(self.watch())
        if self.window is not None:
            self._globalstep_last_logged, losses = self.window
            self._tr_loss += losses[args.process_index]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:  # the losses of the last steps, which may be fewer, are logged too
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise Diverged(name, logs[name], state.global_step)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir=None, state_dict=None):
        # Trainer's method also writes its arguments as a pickle, which can run code when it is loaded.
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial):
        # Trainer deletes older checkpoints before the new one is complete. Here `on_save` does it afterwards.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def on_save(self, args, state, control, **kwargs):
        progress = {
            "settings": self.settings,
            "seconds": self.seconds,
            "counts": self.counts(),
            "activation_kurtosis": self.statistics.state(),
            "emergence": self.emerged,
            # Trainer does not save it, and would log the mean loss of the steps after a resumption only.
            "loss_window": [self._globalstep_last_logged, self.accelerator.gather(self._tr_loss).tolist()],
        }
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            record.write_json(checkpoint / "progress.json", progress)
            seal(checkpoint)
            if args.save_total_limit:
                delete_checkpoints(args.output_dir, keep=args.save_total_limit)

    def restore(self, checkpoint: str) -> None:
        """Continue the counts of an earlier session. Exits with one line if that session had other settings."""
        progress = read_progress(checkpoint)
        earlier = progress["settings"]
        for name, value in self.settings.items():
            if name in earlier and earlier[name] != value:
                sys.exit(
                    f"error: {checkpoint} was made with {name} = {earlier[name]}, not {value}: "
                    "give the same settings to go on with it, or --overwrite to start again"
                )
        self.seconds_before = progress["seconds"]
        counts = progress["counts"]
        self.samples, self.tokens = counts["samples"], counts["tokens"]
        if self.is_world_process_zero():  # these are sums over all processes, and must be counted once
            self.padded_tokens = counts["padded_tokens"]
            self.statistics.load_state(progress["activation_kurtosis"])
        self.emerged = progress["emergence"]
        self.window = progress["loss_window"]


class StopWhenAsked(TrainerCallback):
    """Writes a checkpoint before Ctrl-C or SIGTERM ends the training, for example when a rented machine is taken away.

    A second signal ends the training immediately. With several processes the signals keep their usual effect, because
    no process may leave alone.
    """

    def __init__(self):
        self.received: int | None = None  # the number of the signal
        self.handlers: dict = {}  # the earlier ones

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            numbers = [
                number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN
            ]
            self.handlers = {number: signal.signal(number, self.note) for number in numbers}

    def note(self, number, frame) -> None:
        self.restore()
        self.received = number
        print("Asked to stop: writing a checkpoint after this step (once more ends at once)", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals their earlier handlers back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def shown(logs: dict[str, float] | None) -> dict[str, float]:
    """The figures for a terminal or a log file. Trackers get all."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    return {name: logs[name] for name in names if name in (logs or {})}


class Bar(ProgressCallback):
    """In a terminal: Trainer's progress bar, with a line of figures at every logging step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if figures := shown(logs):
            super().on_log(args, state, control, logs=figures, **kwargs)


class LogLines(TrainerCallback):
    """Outside a terminal: a line with the time left at every logging step, and at least every minute.

    A progress bar would be redrawn several times a second and fill many megabytes. train_runs.py reads these lines.
    """

    SECONDS = 60.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.started = state.global_step, time.monotonic()
        self.last_line = self.started

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.last_line >= self.SECONDS:
            self.tell(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if figures := shown(logs):
            self.tell(state, "".join(f", {name} {value:.4g}" for name, value in figures.items()))

    def tell(self, state, figures: str = "") -> None:
        self.last_line = time.monotonic()
        if state.is_world_process_zero and state.global_step:
            steps = state.global_step - self.first_step
            left = (self.last_line - self.started) / steps * (state.max_steps - state.global_step) if steps else None
            left = "" if left is None else f", {duration(left)} left"
            print(f"step {state.global_step:,} of {state.max_steps:,}{figures}{left}", flush=True)
