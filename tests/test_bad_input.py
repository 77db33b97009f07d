"""Bad input to every script: one line that says what is wrong, the right exit status, and nothing lost.

Each row is (flags as a user types them, exit status, text that the one line must contain), for a small project with the
output of all scripts. The status is 2 if argparse refuses a flag, and 1 otherwise.
"""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import OVERRIDES
from datasets import Dataset, DatasetDict

import analyze_kurtosis
import arguments
import benchmark
import build_dataset
import hub
import train_model
import train_runs
import train_tokenizer

TRAINING = f"--vocab_size 1024 --max_length 32 --config_overrides {OVERRIDES} --max_eval_samples 4 --disable_tqdm true"
RUN = "esperberto-softmax0"
CHECKPOINT = f"models/{RUN}-seed7/checkpoint-1"
NINES = "9" * 20

MAIN = {
    "build_dataset": build_dataset.main,
    "train_tokenizer": train_tokenizer.main,
    "train_model": train_model.main,
    "train_runs": train_runs.main,
    "analyze_kurtosis": analyze_kurtosis.main,
    "hub": hub.main,
    "benchmark": benchmark.main,
}

BUILD = [
    ("--sample", 1, "data exists and is complete: add --overwrite"),
    ("--hub_token hf_secretsecret", 2, "unrecognized arguments: --hub_token <secret>"),
    ("--sample --keep --validation_fraction 0.3", 1, "made with validation_fraction = 0.1, not 0.3"),
    ("--sample --keep --output_dir data-not-json", 1, "data-not-json/manifest.json is damaged"),
    ("--sample --keep --output_dir data-nested", 1, "data-nested/manifest.json is damaged"),
    ("--sample --overwrite --output_dir models", 1, "models is not an earlier result of this script"),
    ("--sample --output_dir file", 1, "file is a file: choose another --output_dir"),
    ("--sample --output_dir file/new", 1, "/file (it is a file): choose another folder or make room"),
    ("--sample --output_dir loop", 1, "loop is a link that leads to no folder"),
    ("--sample --output_dir loop/new", 1, "nothing can be written to loop (it is a link that leads to no folder)"),
    ("--sources oscar --output_dir new --download_dir file", 1, "nothing can be written to file (it is a file)"),
    ("--sample --output_dir new --push_to_hub", 1, "HUGGINGFACE_TOKEN is not set"),
    ("--sample --output_dir new --max_samples 1", 1, "all 1 samples are the same text"),
    ("--from_files nothing.txt --output_dir new", 1, "--from_files nothing.txt matches no file"),
    ("--from_files loop --output_dir new", 1, "--from_files loop matches no file"),
    ("--from_files file --output_dir new", 1, "cannot read file: its name must end in .txt, .gz, .zst"),
    ("--from_files old_mac.txt --output_dir new", 1, r"old_mac.txt ends its lines with \r alone"),
    ("--from_files repeated.txt --output_dir new", 1, "all 500 samples are the same text"),
    ("--from_files four.txt --output_dir new", 1, "(4 different texts) falls into the validation split"),
    ("--sample --from_files four.txt", 2, "not allowed with argument"),
    ("--sample --sources oscar", 2, "not allowed with argument"),
    ("--sources oscar --from_files four.txt", 2, "not allowed with argument"),
    ("--sources osacr", 2, "invalid choice: 'osacr'"),
    ("--sources", 2, "expected at least one argument"),
    ("--sampl", 2, "unrecognized arguments: --sampl"),
    ("four.txt", 2, "unrecognized arguments: four.txt"),
    ("--max_samples 0", 2, "argument --max_samples: needs a whole number from 1 to 2,147,483,648, got '0'"),
    ("--max_samples many", 2, "--max_samples: needs a whole number from 1 to 2,147,483,648, got 'many'"),
    ("--join_words 0", 2, "--join_words: needs a whole number from 1"),
    ("--join_words few", 2, "--join_words: needs a whole number from 1"),
    ("--validation_fraction 0", 2, "must lie between 0 and 1"),
    ("--validation_fraction 1", 2, "must lie between 0 and 1"),
    ("--validation_fraction nan", 2, "must lie between 0 and 1"),
    ("--leipzig_url http://example.org/corpus.tar.gz", 2, "must contain {name}"),
    ("--oscar_url file:///etc/passwd", 2, "must start with http:// or https://"),
]

TOKENIZER = [
    ("", 1, "tokenizer exists and is complete: add --overwrite"),
    ("--keep --vocab_size 300", 1, "tokenizer is there and was made with vocab_size = 1024, not 300"),
    ("--output_dir data --overwrite", 1, "data is not an earlier result of this script"),
    ("--output_dir file/new", 1, "/file (it is a file): choose another folder or make room"),
    ("--data_dir nowhere", 1, "nowhere holds no complete dataset"),
    ("--data_dir loop", 1, "loop holds no complete dataset"),
    ("--data_dir data-not-json", 1, "data-not-json holds no complete dataset"),
    ("--data_dir data-nested", 1, "(nested too deeply): run build_dataset.py first"),
    ("--data_dir data-no-text", 1, "the train split in data-no-text has no column `text` of strings"),
    ("--data_dir data-numbers", 1, "the train split in data-numbers has no column `text` of strings"),
    ("--data_dir data-nulls", 1, "the train split in data-nulls has samples without a text"),
    ("--data_dir data-empty", 1, "data-empty holds no complete dataset"),
    ("--data_dir data-blank --output_dir new", 1, "data-blank holds nothing but white space"),
    ("--vocab_size 260", 2, "--vocab_size: needs a whole number from 261 to 16,777,216, got '260'"),
    (f"--vocab_size {NINES}", 2, "--vocab_size: needs a whole number from 261 to 16,777,216"),
    ("--vocab_size much", 2, "--vocab_size: needs a whole number from 261 to 16,777,216, got 'much'"),
    ("--min_frequency 0", 2, "--min_frequency: needs a whole number from 1 to 16,777,216, got '0'"),
    (f"--min_frequency {NINES}", 2, "--min_frequency: needs a whole number from 1 to 16,777,216"),
    ("--vocab 300", 2, "unrecognized arguments: --vocab 300"),
]

TRAIN = [
    # existing runs and checkpoints
    ("--seed 42", 1, f"{RUN} is complete (results/{RUN}.json is there)"),
    ("--seed 7 --learning_rate 1e-4", 1, f"{CHECKPOINT} was made with learning_rate = 5e-05, not 0.0001"),
    ("--seed 7 --overwrite --resume_from_checkpoint True", 1, "--overwrite starts again, which contradicts"),
    ("--resume_from_checkpoint True", 1, f"models/{RUN}-seed8 has no checkpoint: leave the flag out"),
    ("--resume_from_checkpoint nowhere", 1, "--resume_from_checkpoint nowhere is not a folder"),
    ("--resume_from_checkpoint False", 1, "--resume_from_checkpoint False is not a folder"),
    ("--resume_from_checkpoint data", 1, "data was interrupted while it was written"),
    ("--resume_from_checkpoint damaged/progress.json", 1, "damaged/progress.json is damaged"),
    ("--resume_from_checkpoint damaged/trainer_state.json", 1, "damaged/trainer_state.json is damaged"),
    ("--resume_from_checkpoint damaged/rng_state.pth", 1, "damaged/rng_state.pth is damaged"),
    ("--resume_from_checkpoint damaged/optimizer.pt", 1, "damaged/optimizer.pt is damaged"),
    ("--resume_from_checkpoint damaged/scheduler.pt", 1, "damaged/scheduler.pt is damaged"),
    ("--resume_from_checkpoint damaged/model.safetensors", 1, "damaged/model.safetensors is damaged"),
    ("--output_dir damaged/model", 1, "damaged/model/checkpoint-1 is damaged"),
    # data, tokenizer, folders
    ("--data_dir nowhere", 1, "nowhere holds no complete dataset"),
    ("--data_dir data-not-json", 1, "data-not-json holds no complete dataset"),
    ("--data_dir data-nulls", 1, "has samples without a text"),
    ("--data_dir data-cache", 1, "is damaged"),
    ("--data_dir data-short-cache", 1, "it does not have the samples of the dataset): delete that folder"),
    ("--data_dir data-special", 1, "holds nothing but special tokens"),
    ("--tokenizer_dir nowhere", 1, "nowhere holds no tokenizer: run train_tokenizer.py first"),
    ("--tokenizer_dir tokenizer-damaged", 1, "run train_tokenizer.py again"),
    ("--results_dir file", 1, "nothing can be written to file (it is a file)"),
    ("--results_dir file/new", 1, "nothing can be written to file/new (Not a directory)"),
    ("--output_dir file", 1, "nothing can be written to file (it is a file)"),
    ("--output_dir loop", 1, "nothing can be written to loop (it is a link that leads to no folder)"),
    ("--push_to_hub", 1, "HUGGINGFACE_TOKEN is not set"),
    # the arm and the model
    ("--softmax_n abc", 1, "softmax_n needs a number n >= 0, or learned, got 'abc'"),
    ("--use_softmax1 --softmax_n learned", 1, "contradicts --softmax_n learned"),
    ("--softmax_n -1", 1, "n >= 0"),
    ("--softmax_n nan", 1, "n >= 0"),
    ("--use_softmax1 --softmax_n 2", 1, "contradicts --softmax_n 2"),
    ("--control clipped --softmax_n 1", 1, "--control clipped has an attention of its own"),
    ("--control open", 2, "invalid choice: 'open'"),
    ("--vocab_size 500", 1, "more than --vocab_size 500"),
    ("--vocab_size 1000000000000", 1, "GB for checkpoints and model, but the disk has less"),
    ("--config_overrides layers=2", 1, "with a name out of num_hidden_layers, hidden_size"),
    ("--config_overrides vocab_size=2", 1, "with a name out of num_hidden_layers, hidden_size"),
    ("--config_overrides hidden_size", 1, "takes NAME=VALUE"),
    ("--config_overrides hidden_size=wide", 1, "hidden_size needs a number, got 'wide'"),
    ("--config_overrides hidden_size=2.5", 1, "hidden_size needs a number, got '2.5'"),
    ("--config_overrides hidden_size=0", 1, "hidden_size cannot be 0"),
    ("--config_overrides hidden_size=30", 1, "30 is not a multiple of 12 heads"),
    ("--config_overrides hidden_size=32,hidden_size=64", 1, "names hidden_size twice"),
    ("--config_overrides hidden_act=gellu", 1, "hidden_act cannot be gellu"),
    ("--config_overrides hidden_dropout_prob=1", 1, "hidden_dropout_prob cannot be 1"),
    ("--config_overrides initializer_range=nan", 1, "initializer_range cannot be nan"),
    ("--max_length 513", 1, "the model's 32 positions"),
    ("--mlm_probability 1.5", 1, "between 0 and 1"),
    ("--max_eval_samples 0", 1, "--max_eval_samples must be a number from 1 to"),
    ("--statistics_steps 0", 1, "--statistics_steps must be a number from 1 to"),
    ("--attention flash --use_cpu", 1, "--attention flash"),
    # impossible numbers
    ("--seed -1", 1, "--seed must be a number from 0 to below 4294967296, got -1"),
    (f"--seed {NINES}", 1, "--seed must be a number from 0 to below 4294967296, got 999"),
    ("--data_seed -1", 1, "--data_seed must be a number from 0"),
    ("--learning_rate nan", 1, "--learning_rate must be a number from 0 on, got nan"),
    ("--learning_rate -1", 1, "--learning_rate must be a number from 0 on, got -1"),
    ("--learning_rate inf", 1, "--learning_rate must be a number from 0 on, got inf"),
    ("--weight_decay nan", 1, "--weight_decay must be a number from 0 on, got nan"),
    ("--adam_beta2 1", 1, "--adam_beta2 must be a number from 0 to below 1, got 1"),
    ("--warmup_steps -1", 1, "--warmup_steps must be a number from 0"),
    ("--per_device_train_batch_size 0", 1, "--per_device_train_batch_size must be a number from 1 to"),
    ("--per_device_train_batch_size -4", 1, "--per_device_train_batch_size must be a number from 1 to"),
    (f"--per_device_train_batch_size {NINES}", 1, "--per_device_train_batch_size must be a number from 1 to"),
    ("--per_device_train_batch_size 999 --dataloader_drop_last", 1, "a batch of 999 is more than the 580 training"),
    ("--per_device_eval_batch_size 0", 1, "--per_device_eval_batch_size must be a number from 1 to"),
    ("--gradient_accumulation_steps 0", 1, "--gradient_accumulation_steps must be a number from 1 to"),
    ("--gradient_accumulation_steps 3", 1, "does not divide into 1 processes x 3 accumulation steps"),
    ("--max_steps 0", 1, "--max_steps must be at least 1, or -1 for whole epochs"),
    ("--max_steps -2", 1, "--max_steps must be a number from -1"),
    ("--max_steps -1 --num_train_epochs 0", 1, "--num_train_epochs must be above 0, got 0"),
    ("--num_train_epochs nan", 1, "--num_train_epochs must be a number from 0"),
    ("--logging_steps inf", 1, "--logging_steps must be a number from 0"),
    ("--logging_steps 0", 1, "--logging_steps must be above 0; to switch it off, give --logging_strategy no"),
    ("--eval_steps -1", 1, "--eval_steps must be a number from 0"),
    ("--save_steps 1.5", 1, "--save_steps must be an integer if bigger than 1"),
    ("--save_total_limit -1", 1, "--save_total_limit must be a number from 1"),
    ("--dataloader_num_workers -1", 1, "--dataloader_num_workers must be a number from 0"),
    ("--usd_per_hour -3", 1, "--usd_per_hour must be a number from 0 on, got -3"),
    ("--usd_per_hour nan", 1, "--usd_per_hour must be a number from 0 on, got nan"),
    # other flags of TrainingArguments
    ("--bogus 1", 1, "unknown argument: --bogus"),
    ("--soft 1", 1, "unknown argument: --soft"),
    ("--fp16 true --bf16 true", 1, "bf16"),
    ("--save_strategy best", 1, "the arms are compared by their last models"),
    ("--save_strategy never", 2, "invalid choice: 'never'"),
    ("--lr_scheduler_kwargs {x", 1, "--lr_scheduler_kwargs needs a JSON object"),
    ("--activation_checkpointing_kwargs 3", 1, "--activation_checkpointing_kwargs needs a JSON object"),
    ("--lr_scheduler_type cosine_with_min_lr", 1, "--lr_scheduler_type cosine_with_min_lr: "),
    ("--optim adamw_bnb_8bit", 1, "--optim adamw_bnb_8bit: You need to install `bitsandbytes`"),
    ("--optim lomo", 1, "--optim lomo needs a training loop of its own"),
    ("--optim schedule_free_adamw", 1, "--optim schedule_free_adamw needs a training loop of its own"),
    ("--optim_args a=1", 1, "--optim adamw_torch_fused does not use --optim_args"),
    ("--optim_target_modules all", 1, "does not use --optim_target_modules"),
    ("--torch_compile_backend none_such", 1, "transformers' Trainer: "),
    ("--report_to nobody", 1, "--report_to nobody: nobody is not supported"),
]

RUNS = [
    ("-- --learning_rate 1e-4", 1, f"{RUN}.json is there, of a run with learning_rate = 5e-05, not 0.0001: move"),
    ("--seeds -1", 1, "--seed must be a number from 0"),
    ("--softmax_n nan", 1, "n >= 0"),
    ("--softmax_n 0 lerned", 2, "softmax_n needs a number n >= 0, or learned, got 'lerned'"),
    ("--softmax_n 0.5 --results_dir file", 1, "nothing can be written to file (it is a file)"),
    ("-- --learning_rat 1", 1, "unknown argument: --learning_rat "),
    ("-- --label_smoothing_factor 0.1", 1, "--label_smoothing_factor is not for this script"),
    ("--parallel 0", 2, "--parallel: needs a whole number from 1"),
    ("--parallel two", 2, "--parallel: needs a whole number from 1"),
    ("--output_dir models", 2, "--output_dir needs <run> in it"),
    ("--seeds", 2, "expected at least one argument"),
    ("--seeds 42 43 42", 2, "--seeds names one of them twice"),
    ("--softmax_n 1 1.0", 2, "--softmax_n names one of them twice"),
    ("--controls open", 2, "invalid choice: 'open'"),
    ("-- --control clipped", 2, "--control differs from run to run: give it before the -- (--controls)"),
    ("-- --seed=7", 2, "--seed differs from run to run: give it before the -- (--seeds)"),
    ("-- --output-dir x", 2, "--output_dir differs from run to run"),
]

ANALYZE = [
    ("models/none/none", 1, "no model folder models/none/none"),
    ("--results_dir file", 1, "nothing can be written to file (it is a file)"),
    ("--results_dir no-results", 1, "no results in no-results/: run train_model.py first"),
    ("--models_dir nowhere", 1, "has no model folder nowhere/"),
    ("--data_dir nowhere", 1, "no texts in the validation split of nowhere"),
    ("--data_dir data-empty", 1, "no texts in the validation split of data-empty"),
]

HUB = [
    ("push nowhere", 1, "nowhere holds neither a dataset of build_dataset.py nor a model of train_model.py"),
    ("push tokenizer", 1, "tokenizer holds neither a dataset of build_dataset.py nor a model of train_model.py"),
    ("push data-no-text", 1, "data-no-text holds no complete dataset"),
    ("push data-nested", 1, "data-nested holds no complete dataset (nested too deeply)"),
    (f"push models/{RUN}-wide", 1, f"models/{RUN}-wide holds no complete model"),
    (f"push models/{RUN}-list", 1, f"models/{RUN}-list holds no complete model"),
    (f"push models/{RUN} --results words.json", 1, "words.json is not a results file"),
    (f"push models/{RUN} --results nested.json", 1, "nested.json is not a results file (nested too deeply)"),
    (f"push models/{RUN}", 1, "HUGGINGFACE_TOKEN is not set"),
    ("check", 1, "HUGGINGFACE_TOKEN is not set"),
    ("pull data", 2, "invalid choice: 'pull'"),
    ("push", 2, "the following arguments are required: path"),
]

BENCHMARK = [
    ("step --data_dir nowhere", 1, "nowhere holds no complete dataset"),
    ("tokenize --tokenizer_dir nowhere", 1, "nowhere holds no tokenizer"),
    ("attention --output_dir file", 1, "nothing can be written to file (it is a file)"),
]

TABLE = {
    "build_dataset": BUILD,
    "train_tokenizer": TOKENIZER,
    "train_model": TRAIN,
    "train_runs": RUNS,
    "analyze_kurtosis": ANALYZE,
    "hub": HUB,
    "benchmark": BENCHMARK,
}
CASES = [(script, *row) for script, rows in TABLE.items() for row in rows]


def save_data(path: Path, train: dict, validation: dict | None = None) -> None:
    """A dataset of these columns, in the form of build_dataset.py."""
    splits = {"train": Dataset.from_dict(train), "validation": Dataset.from_dict(validation or train)}
    DatasetDict(splits).save_to_disk(path)
    numbers = {name: {"samples": len(split), "sha256": "0" * 64} for name, split in splits.items()}
    (path / "manifest.json").write_text(json.dumps({"splits": numbers}))


@pytest.fixture(scope="module")
def project(sample, tmp_path_factory):
    """A folder with the output of all scripts, complete and damaged."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(sample / "data", root / "data", ignore=shutil.ignore_patterns("tokenized-*"))
    shutil.copytree(sample / "tokenizer", root / "tokenizer")
    nested = "[" * 100_000
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train_model.main([*shlex.split(TRAINING), "--max_steps", "1"])

        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(train_model, "saved_loss", killed)  # after the training, so that its checkpoint remains
        with pytest.raises(KeyboardInterrupt):
            train_model.main([*shlex.split(TRAINING), "--max_steps", "1", "--seed", "7"])

    for name in ("progress.json", "trainer_state.json", "rng_state.pth", "optimizer.pt", "model.safetensors"):
        shutil.copytree(root / CHECKPOINT, root / "damaged" / name)
        file = root / "damaged" / name / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.copytree(root / CHECKPOINT, root / "damaged" / "scheduler.pt")
    (root / "damaged" / "scheduler.pt" / "scheduler.pt").unlink()
    shutil.copytree(root / "damaged" / "progress.json", root / "damaged" / "model" / "checkpoint-1")

    save_data(root / "data-no-text", {"line": ["kato", "hundo"]})
    save_data(root / "data-numbers", {"text": [1, 2]})
    save_data(root / "data-nulls", {"text": ["kato", None]})
    save_data(root / "data-empty", {"text": ["kato"]}, {"text": []})
    save_data(root / "data-blank", {"text": ["kato"]}, {"text": [" ", "\t"]})
    save_data(root / "data-special", {"text": ["kato"]}, {"text": ["<pad>"]})
    for name, manifest in (("not-json", "{"), ("nested", nested)):
        save_data(root / f"data-{name}", {"text": ["kato", "hundo"]})
        (root / f"data-{name}" / "manifest.json").write_text(manifest)
    for name in ("cache", "short-cache"):
        shutil.copytree(root / "data", root / f"data-{name}")
        [cache] = (path for path in (root / f"data-{name}").glob("tokenized-*") if path.is_dir())
        if name == "cache":
            [file] = (cache / "train").glob("*.arrow")
            file.write_bytes(file.read_bytes()[:999])
        else:
            shutil.rmtree(cache / "validation")
            shutil.copytree(cache / "train", cache / "validation")

    shutil.copytree(root / "tokenizer", root / "tokenizer-damaged")
    (root / "tokenizer-damaged" / "tokenizer.json").write_text("{}")
    config = json.loads((root / "models" / RUN / "config.json").read_text())
    for name, value in (("wide", {**config, "hidden_size": "wide", "max_position_embeddings": "long"}), ("list", [])):
        shutil.copytree(root / "models" / RUN, root / "models" / f"{RUN}-{name}")
        (root / "models" / f"{RUN}-{name}" / "config.json").write_text(json.dumps(value))
    results = json.loads((root / "results" / f"{RUN}.json").read_text())
    (root / "words.json").write_text(json.dumps({**results, "validation": {"loss": "low", "perplexity": "low"}}))
    (root / "nested.json").write_text(nested)
    (root / "no-results").mkdir()
    (root / "file").write_text("a file")
    (root / "loop").symlink_to("loop")
    (root / "old_mac.txt").write_text("\r".join(f"Jen la frazo {i}." for i in range(99)), newline="")
    (root / "repeated.txt").write_text("Ĉiam la sama frazo.\n" * 500)
    (root / "four.txt").write_text("unu\ndu\ntri\nkvar\n")
    return root


def listing(root: Path) -> dict[str, str]:
    """{file: digest} of all files below `root`, except locks, which contain the id of a process."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("script", "flags", "status", "text"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input_gives_one_line_and_loses_nothing(project, monkeypatch, capsys, script, flags, status, text):
    monkeypatch.chdir(project)
    monkeypatch.setattr(hub, "ENV_FILE", project / "no.env")
    for name in ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    argv = shlex.split(flags)
    if script == "train_model":
        argv = [*shlex.split(TRAINING), "--max_steps", "1", "--seed", "8", *argv]
    elif script == "train_runs":
        own, _, handed_on = flags.partition("-- ")
        argv = [*shlex.split(own), "--", *shlex.split(TRAINING), "--max_steps", "1", *shlex.split(handed_on)]
    before = listing(project)
    with pytest.raises(SystemExit) as end:
        MAIN[script](argv)
    printed = capsys.readouterr().err
    if isinstance(end.value.code, str):  # which Python prints on stderr, with status 1
        message, found = end.value.code, 1
        assert "error: " not in printed and "Traceback" not in printed
    else:
        message, found = printed.rstrip("\n"), end.value.code
    assert found == status
    assert message.startswith("error: ") and text in message and "\n" not in message
    after = listing(project)
    assert {name: after.get(name) for name in before} == before
    assert all("tokenized-" in name for name in after.keys() - before.keys())  # which the next command finds


def test_every_flag_in_the_table_of_refused_flags_is_refused(monkeypatch):
    """If its value is not the default. Flags that this release of transformers lacks are unknown."""
    parser = arguments.Parser("")
    known = {action.dest: action for action in reversed(parser._actions)}  # --no_x comes behind --x
    refused = [name for name in arguments.REFUSED if name in known]
    assert len(refused) > 35
    for name in refused:
        action = known[name]
        value = {bool: "True", int: "3", float: "0.5"}.get(type(action.default), "3")
        if action.default is True:
            value = "False"
        elif action.choices:
            value = next(str(choice) for choice in action.choices if choice != action.default)
        with pytest.raises(SystemExit) as end:
            train_model.parse([f"--{name}", value])
        assert end.value.code in (f"error: --{name} is not for this script: {arguments.REFUSED[name]}", 2), name
