"""The Hugging Face Hub: checks the token, pushes models and data, writes their cards.

    python hub.py check                              may the token write for the user?
    python hub.py push models/esperberto-softmax1    model, tokenizer and card -> <user>/esperberto-softmax1
    python hub.py push data                          train and validation as Parquet, and card -> <user>/esperanto

Reads HUGGINGFACE_TOKEN and HUGGINGFACE_USER (a user or an organisation) from the environment or from .env; a model's
card is made of results/<run>.json. Writes the card into the model folder, then everything to the Hub in one commit.
Pushing again is harmless: what the Hub already has is not sent twice, and a push that broke off is completed.
"""

from __future__ import annotations

import argparse
import email.utils
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

import datasets
import dotenv
import httpx
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import record
from folder import scratch
from tables import shortest

UNSET = 3  # exit status of `check --optional`, which runner.sh reads
ENV_FILE = Path(__file__).parent / ".env"
DATASET = "esperanto"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts; huggingface_hub retries within most of them too
MAX_RETRY_AFTER_SECONDS = 600  # when the Hub itself asks for a longer pause
SHARD_BYTES = 500_000_000  # of Arrow data in one Parquet file, the Hub's own recommendation

# Every card of ours carries the first tag, those of --test_pipeline and of the sample the second too. A repository
# without our tag is somebody's other work, and one without the second a real run: neither is overwritten by mistake.
OUR_TAG, TEST_TAG = "esperberto", "test-pipeline"

# How values of another kind than this project writes surface, in reading them or in making a card of them.
WRONG = (ValueError, LookupError, TypeError, AttributeError)

# What a model folder gives to the Hub. Not training_args.bin: it is pickled, so it can run code, and it holds paths and
# names of the machine; nor checkpoints.
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|softmax1\.py"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.json|merges\.txt|README\.md"
)


class HubError(Exception):
    """What went wrong with the Hub, in one line that ends in what to do. Never holds the token."""


class NoCredentials(HubError):
    """Token or user is not set, so nothing can be pushed."""


# -------------------------------------------------------------------------------------------------- token and network


def credentials() -> tuple[str, str]:
    """(token, user) from the environment, or from .env where the environment does not name them.

    Raises NoCredentials when one is missing, HubError when .env cannot be read or the token cannot be one. Warns when
    others can read .env.
    """
    try:
        found = dotenv.dotenv_values(ENV_FILE) if ENV_FILE.is_file() else {}
    except UnicodeDecodeError:
        raise HubError(f"{ENV_FILE.name} is not text in UTF-8: write it again (see .env.example)") from None
    if found.get("HUGGINGFACE_TOKEN") and ENV_FILE.stat().st_mode & 0o077:
        print(f"warning: others on this machine can read the token in .env: chmod 600 {ENV_FILE.name}", file=sys.stderr)
    values = []
    for name in ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER"):
        value = (os.environ.get(name, found.get(name)) or "").strip()
        if not value:
            raise NoCredentials(f"{name} is not set: put it into .env (see .env.example) or the environment")
        values.append(value)
    token, user = values
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise HubError("HUGGINGFACE_TOKEN has characters that no token has: copy it again")
    return token, user


class Hub:
    """The Hub as HUGGINGFACE_USER sees it; `namespace` is that user or organisation.

    Raises HubError unless the token is accepted and may write there.
    """

    def __init__(self):
        self.token, user = credentials()
        self.namespace = user
        self.api = HfApi(token=self.token, library_name="esperberto")
        me = self.call(self.api.whoami)
        self.namespace = writable_namespace(me, user)

    def call(self, function: Callable, *args, **kwargs):
        """function(*args, **kwargs), again after a pause where the Hub or the network may recover.

        Raises HubError for anything that waiting does not mend, and when every attempt has failed.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                return function(*args, **kwargs)
            except Exception as error:  # the upload threads wrap what they meet in a RuntimeError
                cause = next((e for e in causes(error) if isinstance(e, (httpx.HTTPError, OSError))), error)
                status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
                if status is None and isinstance(cause, httpx.HTTPStatusError):
                    status = cause.response.status_code
                # hf_xet, the Hub's storage client, raises a RuntimeError when it cannot reach the storage.
                passing = status in (408, 429) or (status or 0) >= 500
                if status is None and not isinstance(cause, OfflineModeIsEnabled):
                    passing = isinstance(cause, (httpx.TransportError, ConnectionError, TimeoutError, RuntimeError))
                if not passing or pause is None:
                    raise HubError(self.redacted(self.explanation(cause, status))) from None
                if status is not None:
                    pause = max(pause, retry_after_seconds(cause.response))
                what = f"HTTP {status}" if status else self.redacted(record.one_line(cause))
                tqdm.write(f"the Hub: {what}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)

    def explanation(self, error: BaseException, status: int | None) -> str:
        """What is wrong and what to do, in one line."""
        if status == 401:
            return f"the Hub does not accept HUGGINGFACE_TOKEN (HTTP 401): make a new one that can write, {TOKENS_PAGE}"
        if status == 403:
            return (
                f"the token may not do that for {self.namespace} (HTTP 403, {record.one_line(error)}): "
                f"give it write permission there, {TOKENS_PAGE}"
            )
        if status == 404:
            return f"the Hub does not find {self.namespace} or a repository of it (HTTP 404): check HUGGINGFACE_USER"
        if status is not None:
            return f"the Hub answers HTTP {status} ({record.one_line(error)}): try again later"
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"
        if isinstance(error, (httpx.HTTPError, OSError, RuntimeError)):
            return f"the Hub cannot be reached ({record.one_line(error)}): check the network and try again"
        return f"the Hub refuses this ({record.one_line(error)}): see above"

    def redacted(self, text: str) -> str:
        """`text` without the token, or anything that looks like one."""
        return re.sub(r"hf_\w{4,}", "<secret>", text.replace(self.token, "<secret>"))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def retry_after_seconds(response: httpx.Response) -> float:
    """How long the Hub asks to wait: seconds or a date in Retry-After, 0 where it says nothing."""
    value = response.headers.get("Retry-After", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            seconds = 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def writable_namespace(me: dict, user: str) -> str:
    """`user` as the Hub spells it, when the token that `me` (the Hub's answer to whoami) describes may write there.

    A classic token has the role read or write. A fine-grained one lists permissions for users, organisations and single
    repositories; one for single repositories passes here if any of them is the user's, and fails later if it is
    another than the one pushed to.
    """
    organisations = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    names = {name.lower(): name for name in (me["name"], *organisations)}
    if user.lower() not in names:
        known = ", ".join(names.values())
        raise HubError(f"HUGGINGFACE_USER is {user}, but the token belongs to {me['name']} and knows only {known}")
    namespace = names[user.lower()]
    if organisations.get(namespace) == "read":
        raise HubError(f"{me['name']} has only read access to the organisation {namespace}: ask its owner, or set USER")
    token = me.get("auth", {}).get("accessToken", {})
    permitted = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        permitted = any(
            "repo.write" in scope.get("permissions", [])
            and scope.get("entity", {}).get("name", "").split("/")[0].lower() == namespace.lower()
            for scope in scopes
        )
    if not permitted:
        raise HubError(f"the token cannot write to repositories of {namespace}: make one that can, {TOKENS_PAGE}")
    return namespace


# ------------------------------------------------------------------------------------------------------------ pushing


def push(path: str | Path, results: str | Path | None = None, private: bool = False) -> None:
    """Push a dataset of build_dataset.py or a model of train_model.py, whole, and exit with one line if that fails.

    Args:
        path: the folder.
        results: the model's results file; default results/<run>.json beside models/. Without one the card says that
            nothing is known.
        private: make a new repository private, and refuse an existing one that is not.
    """
    path = Path(path)
    beside = path.absolute().parent.parent / "results" / f"{path.absolute().name}.json"
    again = ["python", "hub.py", "push", str(path)]
    if results is not None and Path(results).absolute() != beside:
        again += ["--results", str(results)]
    again += ["--private"] if private else []
    if diverged(Path(results or beside)):
        print(f"{path} diverged in training, so there is no model to push.")
        return
    # What is to be pushed is read first: of what is not there or not whole nothing may be said to be saved.
    if (path / "dataset_dict.json").is_file():
        send, what = push_dataset, read_dataset(path)
    elif (path / "config.json").is_file():
        send, what = push_model, read_model(path, Path(results or beside))
    else:
        sys.exit(f"error: {path} holds neither a dataset of build_dataset.py nor a model of train_model.py")
    try:
        send(Hub(), path, what, private)
    except HubError as error:
        sys.exit(f"error: {error}. {path} is saved and complete here; this pushes it: {shlex.join(again)}")


def diverged(results_path: Path) -> bool:
    """Whether the results file says that the run diverged; False where there is none that can be read."""
    try:
        return record.read_json(results_path).get("status") == "diverged"
    except (OSError, ValueError, AttributeError):
        return False


def push_model(hub: Hub, folder: Path, what: tuple[dict, dict | None], private: bool) -> None:
    """`what` is of `read_model`."""
    config, results = what
    run = folder.absolute().name if results is None else results["run"]
    repo = f"{hub.namespace}/{run}"
    card = model_card(repo, config, results)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [entry.name for entry in folder.iterdir() if entry.is_file() and MODEL_FILES.fullmatch(entry.name)]
    test = results is not None and bool(results.get("test_pipeline"))
    stale = ["*.safetensors", "model.safetensors.index.json", "softmax1.py"]
    upload(hub, repo, "model", folder, files, stale, test, private)


def read_model(folder: Path, results_path: Path) -> tuple[dict, dict | None]:
    """config.json and the results file, checked against each other. Exits with one line when the model is not whole."""
    try:
        config = record.read_json(folder / "config.json")
        weights = sorted(folder.glob("model*.safetensors"))
        for file in weights:
            safe_open(file, "pt").keys()
        missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
        if config["model_type"] not in ("roberta", "roberta-softmax-n"):
            raise ValueError(f"a {config['model_type']} is a control of the experiment, and not for the Hub")
        if config["model_type"] == "roberta-softmax-n":
            missing += [] if (folder / "softmax1.py").is_file() else ["softmax1.py"]
            missing += [] if "AutoModelForMaskedLM" in config.get("auto_map", {}) else ["auto_map in config.json"]
        if missing or not weights:
            raise ValueError(f"no {(missing or ['model.safetensors'])[0]}")
        model_card(f"user/{folder.name}", config, None)
    except (OSError, *WRONG, SafetensorError) as error:
        sys.exit(f"error: {folder} holds no whole model ({record.one_line(error)}): train it again")
    if not results_path.is_file():
        print(f"note: there is no {results_path}, so the card of {folder} says little", file=sys.stderr)
        return config, None
    try:
        results = record.read_json(results_path)
        n, run = results["softmax_n"], results["run"]
        model_card(f"user/{run}", config, results)
    except (OSError, *WRONG) as error:
        sys.exit(f"error: {results_path} is no results file ({record.one_line(error)}): give the right --results")
    if n != config.get("softmax_n", 0.0):
        sys.exit(f"error: {results_path} ({run}, n = {n}) is not about the model in {folder}: give the right --results")
    return config, results


def read_dataset(folder: Path) -> tuple[dict, dict[str, datasets.Dataset]]:
    """manifest.json and the splits, checked against each other. Exits with one line when the dataset is not whole."""
    try:
        manifest = record.read_json(folder / "manifest.json")
        splits = {split: datasets.Dataset.load_from_disk(folder / split) for split in ("train", "validation")}
        for split, dataset in splits.items():
            if len(dataset) != manifest["splits"][split]["samples"]:
                raise ValueError(f"{len(dataset):,} samples in {split}, manifest.json has another number")
        dataset_card(f"user/{DATASET}", manifest, splits)
    except (OSError, *WRONG) as error:
        sys.exit(f"error: {folder} holds no whole dataset ({record.one_line(error)}): run build_dataset.py")
    return manifest, splits


def push_dataset(hub: Hub, folder: Path, what: tuple[dict, dict[str, datasets.Dataset]], private: bool) -> None:
    """One commit of Parquet files and card; at most one batch of rows is in memory. `what` is of `read_dataset`."""
    manifest, splits = what
    repo = f"{hub.namespace}/{DATASET}"
    with scratch(folder.absolute()) as stage:
        (stage / "data").mkdir()
        for split, dataset in splits.items():
            shards = math.ceil(dataset.data.nbytes / SHARD_BYTES)
            for i in range(shards):
                name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
                dataset.shard(shards, i, contiguous=True).to_parquet(stage / "data" / name)
        (stage / "README.md").write_text(dataset_card(repo, manifest, splits), encoding="utf-8")
        files = [str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file()]
        test = [source["name"] for source in manifest["sources"]] == ["sample"]
        upload(hub, repo, "dataset", stage, files, ["data/*.parquet"], test, private)


def upload(
    hub: Hub, repo: str, kind: str, folder: Path, files: list[str], stale: list[str], test: bool, private: bool
) -> None:
    """Make the repository if there is none, and put `files` into it in one commit, which is whole or absent.

    Args:
        hub: whose repository.
        repo: "namespace/name".
        kind: "model" or "dataset".
        folder: where the files are.
        files: their names below it.
        stale: patterns of files that are deleted from the repository if they are not among `files`.
        test: a test run, which may only replace another one.
        private: refuse a repository that is public.
    """
    hub.call(hub.api.create_repo, repo, repo_type=kind, private=private or None, exist_ok=True)
    info = hub.call(hub.api.repo_info, repo, repo_type=kind)
    tags = (info.card_data or {}).get("tags") or []
    filled = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes"}
    if private and not info.private:
        raise HubError(f"{repo} is public on the Hub: make it private there, or push without --private")
    if filled and OUR_TAG not in tags:
        raise HubError(f"{repo} on the Hub is not of this project (no tag {OUR_TAG}): rename it there")
    if filled and test and TEST_TAG not in tags:
        raise HubError(f"{repo} on the Hub is a real run, which a test run does not replace: use another user")
    commit = hub.call(
        hub.api.upload_folder,
        repo_id=repo,
        repo_type=kind,
        folder_path=folder,
        allow_patterns=files,
        delete_patterns=stale,
        commit_message=f"Push {repo.split('/')[1]}",
    )
    print(f"{kind} {repo} is on the Hub: {hub.api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}")
    return commit


# -------------------------------------------------------------------------------------------------------- model cards

WIDGETS = ["La suno <mask>.", "Mi <mask> vin.", "Esperanto estas internacia <mask>.", "La urbo estas tre <mask>."]
# Rows of the kurtosis table: label, name behind `layer.<i>.`, in the results file's weights or activations.
KURTOSIS_ROWS = [
    ("attention output: dense weight", "attention.output.dense.weight", "weight_excess_kurtosis"),
    ("attention output: dense bias", "attention.output.dense.bias", "weight_excess_kurtosis"),
    ("attention output: LayerNorm weight", "attention.output.LayerNorm.weight", "weight_excess_kurtosis"),
    ("attention output: LayerNorm bias", "attention.output.LayerNorm.bias", "weight_excess_kurtosis"),
    ("attention output: dense, activations", "attention.output.dense", "activation_excess_kurtosis"),
    ("attention output: dropout, activations", "attention.output.dropout", "activation_excess_kurtosis"),
    ("attention output: LayerNorm, activations", "attention.output", "activation_excess_kurtosis"),
    ("FFN output: dense, activations", "output.dense", "activation_excess_kurtosis"),
    ("FFN output: LayerNorm, activations", "output", "activation_excess_kurtosis"),
]


def look_up(results: dict | None, key: str):
    """The value at a dotted key, None where there is none."""
    value = results
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def shown(value, form: str = "") -> str:
    """A number of the results file as text; "unknown" where it was not recorded."""
    return "unknown" if value is None else format(value, form)


def layer_values(results: dict, kind: str, name: str) -> list[float]:
    """Excess kurtosis of one parameter or module in every layer; layers where it is not a number are left out."""
    pattern = re.compile(rf"(?:.*\.)?layer\.\d+\.{re.escape(name)}")
    return [value for key, value in (results.get(kind) or {}).items() if pattern.fullmatch(key) and value is not None]


def kurtosis_table(results: dict) -> str:
    lines = ["| | mean ± deviation over the layers | smallest | largest |", "| --- | ---: | ---: | ---: |"]
    for label, name, kind in KURTOSIS_ROWS:
        if values := layer_values(results, kind, name):
            spread = f"{statistics.fmean(values):.3g} ± {statistics.pstdev(values):.2g}"
            lines.append(f"| {label} | {spread} | {min(values):.3g} | {max(values):.3g} |")
    return "\n".join(lines)


def front_matter(data: ModelCardData | dict) -> str:
    text = data.to_yaml() if isinstance(data, ModelCardData) else yaml.safe_dump(data, sort_keys=False)
    return f"---\n{text.strip()}\n---\n"


def model_card(repo: str, config: dict, results: dict | None) -> str:
    """README.md of a model: its metadata for the Hub and what a reader must know, all of it from its own files.

    Args:
        repo: "namespace/name".
        config: the model's config.json.
        results: its results/<run>.json, or None.
    """
    namespace, run = repo.split("/")
    n = config.get("softmax_n", 0.0)
    test = bool(look_up(results, "test_pipeline"))
    loss, perplexity = look_up(results, "validation.loss"), look_up(results, "validation.perplexity")
    metrics = [("loss", loss, "Held-out masked-LM loss (nats)"), ("perplexity", perplexity, "Held-out perplexity")]
    data = ModelCardData(
        language="eo",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="fill-mask",
        mask_token="<mask>",
        tags=[OUR_TAG, "roberta", f"softmax{shortest(n)}", "attention-is-off-by-one", *([TEST_TAG] if test else [])],
        datasets=[f"{namespace}/{DATASET}"],
        widget=[{"text": text} for text in WIDGETS],
        model_name=run,
        eval_results=[
            EvalResult(
                task_type="fill-mask",
                dataset_type=f"{namespace}/{DATASET}",
                dataset_name="Esperanto, held-out split",
                dataset_split="validation",
                metric_type=kind,
                metric_value=round(value, 6),
                metric_name=name,
            )
            for kind, value, name in metrics
            if value is not None
        ]
        or None,
    )
    if n == 0:
        nature = "with ordinary softmax attention: the control arm of the experiment. It is a plain RoBERTa."
        trust = ""
    else:
        name = "softmax1" if n == 1 else f"softmax_n, n = {shortest(n)}"
        nature = (
            f"whose attention is {name}, exp(x_i) / ({shortest(n)} + sum_j exp(x_j)) in place of softmax, so that an "
            "attention head may attend to nothing."
        )
        trust = ", trust_remote_code=True"
    sections = [
        front_matter(data),
        f"# {run}",
        *(["**A test run of a few steps, to try the pipeline. It has learnt nothing.**"] if test else []),
        f"A RoBERTa ({config.get('num_hidden_layers')} layers, {config.get('num_attention_heads')} heads, hidden size "
        f"{config.get('hidden_size')}) for Esperanto, trained from random weights, {nature} One arm of a test of Evan "
        'Miller\'s ["Attention Is Off By One"](https://www.evanmiller.org/attention-is-off-by-one.html); '
        f"the run with the same seed and another n is its pair.",
        "## How to load",
        loading(repo, n, trust),
        "## ONNX",
        exporting(config),
        "## Training data",
        training_data(namespace, results),
        "## Training",
        recipe(results),
        "## Excess kurtosis",
        "Unknown: this model came without its results file."
        if results is None
        else "mean((x - mean)^4) / variance^2 - 3, 0 for a Gaussian, over all entries of a parameter; for activations "
        "over the tokens and channels of one sequence, then averaged over the sequences of training (dropout on). "
        "± is the population standard deviation over the layers.\n\n" + kurtosis_table(results),
        "## Limits",
        "Trained on text of the web, which holds errors, prejudice and other languages; the model repeats them. It "
        "fills masks and can be fine-tuned, but does not write text, and reads "
        f"{config.get('max_position_embeddings', 514) - 2} tokens at most. One run is one seed: a difference between "
        "two runs is not yet a difference between softmax and softmax1."
        + (" The fast attention kernels of other libraries do not know softmax_n." if n else ""),
        "## Licence",
        "Weights and code: Apache-2.0, as the project. It covers what is ours to license, not the texts the model was "
        f"trained on, whose terms the card of [{namespace}/{DATASET}](https://huggingface.co/datasets/{namespace}/{DATASET})"
        " gives.",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def loading(repo: str, n: float, trust: str) -> str:
    code = f"""```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

fill = pipeline("fill-mask", model="{repo}"{trust})
print(fill("La suno <mask>."))

model = AutoModelForMaskedLM.from_pretrained("{repo}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})
```"""
    if n == 0:
        return f"{code}\n\nNo code but transformers' own is needed."
    return f"""{code}

transformers 5.0 or later. `softmax1.py`, one file of this repository that imports only torch and transformers, is the
code that `trust_remote_code=True` runs: read it first. Without it loading fails, and so does loading with a stock
RoBERTa class: the weights would silently attend with softmax. `model.config.softmax_n` is {shortest(n)}.
`AutoModel`, `AutoModelForSequenceClassification` and `AutoModelForTokenClassification` load it for fine-tuning in the
same way, and what they save keeps n."""


def exporting(config: dict) -> str:
    return f"""After the lines above (and `pip install onnx onnxscript`); the attention, and its n, are in the graph:

```python
import torch

inputs = dict(tokenizer(["La suno <mask>.", "Mi <mask> vin tre."], padding=True, return_tensors="pt"))
batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max={config["max_position_embeddings"] - 2})
shapes = {{name: {{0: batch, 1: length}} for name in inputs}}
torch.onnx.export(model.eval(), (), "model.onnx", kwargs=inputs, dynamo=True, dynamic_shapes=shapes)
```"""


def training_data(namespace: str, results: dict | None) -> str:
    link = f"[{namespace}/{DATASET}](https://huggingface.co/datasets/{namespace}/{DATASET})"
    if results is None:
        return f"Unknown: this model came without its results file. The project's data is {link}."
    sources = look_up(results, "dataset.sources") or []
    return (
        f"{link}: {shown(look_up(results, 'dataset.train_samples'), ',')} samples, one line each, of "
        + "; ".join(f"{name} ({terms_of(name)[0]})" for name in sources)
        + f". SHA-256 of the training text: {shown(look_up(results, 'dataset.sha256'))}."
    )


def recipe(results: dict | None) -> str:
    if results is None:
        return "Unknown: this model came without its results file."
    settings = results.get("settings") or {}
    seconds = look_up(results, "training.wall_seconds")
    hours = "time unknown" if seconds is None else f"{seconds / 3600:.2f} h"
    machine = f"{shown(look_up(results, 'hardware.count'))} x {shown(look_up(results, 'hardware.name'))}"
    dirty = " with uncommitted changes" if look_up(results, "git.dirty") else ""
    rows = {
        "n of softmax_n; seed": f"{shortest(results['softmax_n'])}; {shown(results.get('seed'))}",
        "objective": f"masked LM, {shown(settings.get('mlm_probability'), '.0%')} of the tokens (80/10/10)",
        "steps; effective batch": f"{shown(look_up(results, 'training.steps'), ',')}; "
        f"{shown(results.get('effective_batch_size'))}",
        "epochs": shown(settings.get("num_train_epochs")),
        "samples; real tokens": f"{shown(look_up(results, 'training.samples'), ',')}; "
        f"{shown(look_up(results, 'training.tokens'), ',')}",
        "tokens of a sample at most": shown(settings.get("max_length")),
        "optimiser": f"{shown(settings.get('optim'))}, lr {shown(settings.get('learning_rate'))}, "
        f"{shown(settings.get('lr_scheduler_type'))}, warm-up {shown(settings.get('warmup_steps'))}, "
        f"weight decay {shown(settings.get('weight_decay'))}, clip {shown(settings.get('max_grad_norm'))}",
        "precision": shown(results.get("dtype")),
        "hardware": f"{machine}, {hours}",
        "code": f"commit {shown(look_up(results, 'git.commit'))}{dirty}",
        "versions": ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()),
        "**training loss, mean over the run**": shown(look_up(results, "training.loss_mean"), ".4f"),
        "**held-out loss; perplexity**": f"{shown(look_up(results, 'validation.loss'), '.4f')}; "
        f"{shown(look_up(results, 'validation.perplexity'), '.2f')} "
        f"({shown(look_up(results, 'validation.masked_tokens'), ',')} masked tokens)",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


# ------------------------------------------------------------------------------------------------------- dataset card

# What the providers state, read in November 2026.
OSCAR_TERMS = (
    "OSCAR 2019, from Common Crawl",
    "The [OSCAR project](https://oscar-project.org) releases its packaging under CC0 1.0 and says that it owns none of "
    "the text; for that it refers to [Common Crawl's terms of use](https://commoncrawl.org/terms-of-use). The authors' "
    "rights remain.",
)
LEIPZIG_TERMS = (
    "Leipzig Corpora Collection",
    "The [terms of usage](https://wortschatz.uni-leipzig.de/en/usage) put the corpora offered for download under "
    "Creative Commons BY. Some who used them in other years quote BY-NC, which holds for what the site itself answers, "
    "so ask before commercial use. Attribution: D. Goldhahn, T. Eckart, U. Quasthoff, Building Large Monolingual "
    "Dictionaries at the Leipzig Corpora Collection: From 100 to 200 Languages, LREC 2012.",
)
SAMPLE_TERMS = ("written for this project", "Written for this project by a language model; CC0 1.0.")
OTHER_TERMS = ("the user's own file", "A file of whoever built this dataset; its terms are not known here.")


def terms_of(source: str) -> tuple[str, str]:
    """(what it is, its terms) of a source, by its name in the manifest."""
    if source == "oscar":
        return OSCAR_TERMS
    if source == "sample":
        return SAMPLE_TERMS
    return LEIPZIG_TERMS if re.fullmatch(r"epo_\w+_\d{4}_\d+[KM]", source) else OTHER_TERMS


def dataset_card(repo: str, manifest: dict, splits: dict[str, datasets.Dataset]) -> str:
    """README.md of the dataset: metadata for the Hub's viewer, and the manifest's figures.

    Args:
        repo: "namespace/name".
        manifest: data/manifest.json.
        splits: the splits themselves, for their sizes.
    """
    sources = manifest["sources"]
    names = [source["name"] for source in sources]
    total = sum(len(split) for split in splits.values())
    test = names == ["sample"]
    size = next(size for limit, size in SIZES if total < limit)
    data = {
        "language": ["eo"],
        "license": "cc0-1.0" if test else "other",
        **({} if test else {"license_name": "terms-of-the-sources", "license_link": "#sources-and-terms"}),
        "pretty_name": "Esperanto",
        "task_categories": ["fill-mask", "text-generation"],
        "size_categories": [size],
        "tags": [OUR_TAG, *([TEST_TAG] if test else [])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
        "dataset_info": {
            "features": [{"name": "text", "dtype": "string"}],
            "splits": [
                {"name": name, "num_bytes": d.data.nbytes, "num_examples": len(d)} for name, d in splits.items()
            ],
            "dataset_size": sum(split.data.nbytes for split in splits.values()),
        },
    }
    table = ["| source | lines read | kept | dropped | SHA-256 of the file |", "| --- | ---: | ---: | --- | --- |"]
    for source in sources:
        dropped = ", ".join(f"{count:,} {why}" for why, count in source["lines_dropped"].items() if count) or "0"
        read, kept = f"{source['lines_read']:,}", f"{source['lines_kept']:,}"
        table.append(f"| {source['name']} | {read} | {kept} | {dropped} | `{source['sha256']}` |")
    figures = ["| split | samples | SHA-256 of the text |", "| --- | ---: | --- |"]
    for split, numbers in manifest["splits"].items():
        figures.append(f"| {split} | {numbers['samples']:,} | `{numbers['sha256']}` |")
    kinds = dict.fromkeys(terms_of(name) for name in names)
    shuffled = "samples stand source after source" if len(names) > 1 else "samples stand in the order of the source"
    sections = [
        front_matter(data),
        "# Esperanto",
        *(["**The small corpus of the project, to try the pipeline.**"] if test else []),
        f"Esperanto text, one line a sample, {total:,} samples: the training text of the EsperBERTo models. "
        f"Duplicates are kept, {shuffled}. {manifest['validation_fraction']:.2%} of the samples are held out; which "
        "ones depends on their text alone, so that no text is in both splits.",
        f'```python\nfrom datasets import load_dataset\n\ndata = load_dataset("{repo}")\n```',
        "\n".join(figures),
        "## Sources and terms",
        "\n".join(table),
        "\n\n".join(f"**{what}.** {terms}" for what, terms in kinds),
        "This is what the providers state, as far as we know; it is no legal advice. Where you hold rights in a text "
        "and want it removed, open a discussion in this repository.",
        "## Limits",
        "Invented texts, far too few to learn a language from."
        if test
        else "Mostly text found on the web by machine: it holds errors, other languages, boilerplate, personal data "
        "that was public, and opinions of every kind. Sentences of the Leipzig corpora stand alone, out of context.",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


# The Hub's names for sizes.
SIZES = [
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (math.inf, "10M<n<100M"),
]


# --------------------------------------------------------------------------------------------------------------- main


def check() -> str:
    """The namespace that pushes go to. Exits with one line, before any work is done, if they could not."""
    try:
        return Hub().namespace
    except HubError as error:
        sys.exit(f"error: {error}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="check that HUGGINGFACE_TOKEN may write for HUGGINGFACE_USER")
    checking.add_argument(
        "--optional",
        action="store_true",
        help=f"end with status {UNSET} where the two are not both set: no push is meant",
    )
    pushing = commands.add_parser("push", help="push a model folder or a dataset")
    pushing.add_argument("path", help="models/<run> or data")
    pushing.add_argument("--results", metavar="FILE", help="the model's results (default: results/<run>.json)")
    pushing.add_argument("--private", action="store_true", help="into a private repository")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    datasets.disable_progress_bars()
    if args.command == "check":
        if args.optional:
            try:
                credentials()
            except NoCredentials:
                print("Nothing will be pushed to the Hub: HUGGINGFACE_TOKEN and HUGGINGFACE_USER are not both set.")
                sys.exit(UNSET)
            except HubError:
                pass  # said by check
        print(f"The token may write for {check()}.")
    else:
        push(args.path, args.results, args.private)


if __name__ == "__main__":
    command.run(main)
