"""The Hugging Face Hub: checks the token, pushes models and data, gives them their cards (cards.py).

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
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import record
from cards import DATASET, OUR_TAG, TEST_TAG, dataset_card, model_card
from folder import scratch

UNSET = 3  # exit status of `check --optional`, which runner.sh reads
ENV_FILE = Path(__file__).parent / ".env"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts; huggingface_hub retries within most of them too
MAX_RETRY_AFTER_SECONDS = 600  # when the Hub itself asks for a longer pause
SHARD_BYTES = 500_000_000  # of Arrow data in one Parquet file, the Hub's own recommendation

# What Python raises where a file holds values of another type than this project writes.
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
    # What is to be pushed is read first, so that the message below never calls saved what is missing or incomplete.
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
    """`what` is what `read_model` returned."""
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
    """One commit of Parquet files and card; at most one batch of rows is in memory.

    `what` is what `read_dataset` returned.
    """
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
