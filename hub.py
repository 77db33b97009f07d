"""The Hugging Face Hub: checks the token, and pushes models and data with their cards (cards.py).

    python hub.py check                              check that the token may write for the user
    python hub.py push models/esperberto-softmax1    model, tokenizer and card -> <user>/esperberto-softmax1
    python hub.py push data                          train and validation as Parquet, and card -> <user>/esperanto

Reads HUGGINGFACE_TOKEN and HUGGINGFACE_USER (a user or an organisation) from the environment or from .env, and the
figures of a model's card from results/<run>.json. Writes the card into the model folder, then everything to the Hub in
one commit. A repeated push is harmless: files that the Hub already has are not sent again, and an interrupted push is
completed.
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
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts; within most attempts huggingface_hub retries too
MAX_RETRY_AFTER_SECONDS = 600  # the longest pause, even if the Hub asks for a longer one
SHARD_BYTES = 500_000_000  # of Arrow data in one Parquet file, as the Hub recommends

# hf_xet, the Hub's storage client, raises a RuntimeError when it cannot reach the storage.
NETWORK_ERRORS = (httpx.TransportError, ConnectionError, TimeoutError, RuntimeError)
# Errors that Python raises for a file with other values than this project writes.
WRONG = (ValueError, LookupError, TypeError, AttributeError)

# The files of a model folder that are pushed. training_args.bin is not: it is a pickle, which can run code, and it
# contains paths and names of the machine.
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|softmax1\.py"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.json|merges\.txt|README\.md"
)


class HubError(Exception):
    """One line that says what went wrong with the Hub, and what to do. It never contains the token."""


class NoCredentials(HubError):
    """The token or the user is not set, so nothing can be pushed."""


# -------------------------------------------------------------------------------------------------- token and network


def credentials() -> tuple[str, str]:
    """(token, user), each from the environment or, if it is not set there, from .env.

    Raises NoCredentials if one is missing, and HubError if .env is not a text or the token not a token. Warns if other
    users of the machine can read .env.
    """
    try:
        from_file = dotenv.dotenv_values(ENV_FILE) if ENV_FILE.is_file() else {}
    except UnicodeDecodeError:
        raise HubError(f"{ENV_FILE.name} is not text in UTF-8: write it again (see .env.example)") from None
    if from_file.get("HUGGINGFACE_TOKEN") and ENV_FILE.stat().st_mode & 0o077:
        print(f"warning: others on this machine can read the token in .env: chmod 600 {ENV_FILE.name}", file=sys.stderr)
    values = []
    for name in ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER"):
        value = (os.environ.get(name, from_file.get(name)) or "").strip()
        if not value:
            raise NoCredentials(f"{name} is not set: put it into .env (see .env.example) or the environment")
        values.append(value)
    token, user = values
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise HubError("HUGGINGFACE_TOKEN has characters that no token has: copy it again")
    return token, user


class Hub:
    """A client of the Hub for HUGGINGFACE_USER; `namespace` is that user or organisation, as the Hub spells it.

    Raises HubError if the Hub does not accept the token, or the token may not write there.
    """

    def __init__(self):
        self.token, user = credentials()
        self.namespace = user
        self.api = HfApi(token=self.token, library_name="esperberto")
        me = self.call(self.api.whoami)
        self.namespace = writable_namespace(me, user)

    def call(self, function: Callable, *args, **kwargs):
        """function(*args, **kwargs), repeated after a pause for errors from which the Hub or the network may recover.

        Raises HubError for all other errors, and after the last attempt.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                return function(*args, **kwargs)
            except Exception as error:  # upload threads wrap an error in a RuntimeError
                cause = next((e for e in causes(error) if isinstance(e, (httpx.HTTPError, OSError))), error)
                status = None
                if isinstance(cause, (HfHubHTTPError, httpx.HTTPStatusError)):
                    response = cause.response
                    status = response.status_code
                    transient = status in (408, 429) or status >= 500
                else:
                    transient = isinstance(cause, NETWORK_ERRORS) and not isinstance(cause, OfflineModeIsEnabled)
                if not transient or pause is None:
                    raise HubError(self.redacted(self.explanation(cause, status))) from None
                if status is not None:
                    pause = max(pause, retry_after_seconds(response))
                reason = f"HTTP {status}" if status else self.redacted(record.one_line(cause))
                tqdm.write(f"the Hub: {reason}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)

    def explanation(self, error: BaseException, status: int | None) -> str:
        """What is wrong, and what to do, in one line."""
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
        """`text` without the token, and without anything that looks like a token."""
        return re.sub(r"hf_\w{4,}", "<secret>", text.replace(self.token, "<secret>"))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def retry_after_seconds(response: httpx.Response) -> float:
    """The pause that the Hub asks for in Retry-After, as seconds or as a date; 0 without it."""
    value = response.headers.get("Retry-After", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):  # neither a number nor a date
            seconds = 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def writable_namespace(me: dict, user: str) -> str:
    """`user` as the Hub spells it. Raises HubError if the token may not write there; `me` is the answer to whoami.

    A classic token has the role read or write. A fine-grained token has permissions for users, organisations and single
    repositories. With a permission for one repository of the user it is accepted here, and fails later if the push is
    to another repository.
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
    """Push a dataset of build_dataset.py or a model of train_model.py, and exit with one line if that fails.

    Args:
        path: the folder.
        results: the model's results file, by default results/<run>.json next to models/. Without it the card has no
            figures.
        private: make a new repository private, and refuse an existing public one.
    """
    path = Path(path)
    default = path.absolute().parent.parent / "results" / f"{path.absolute().name}.json"
    again = ["python", "hub.py", "push", str(path)]
    if results is not None and Path(results).absolute() != default:
        again += ["--results", str(results)]
    again += ["--private"] if private else []
    if diverged(Path(results or default)):
        print(f"{path} diverged in training, so there is no model to push.")
        return
    # Read before anything is pushed, because the message below says that the folder is complete.
    if (path / "dataset_dict.json").is_file():
        send, content = push_dataset, read_dataset(path)
    elif (path / "config.json").is_file():
        send, content = push_model, read_model(path, Path(results or default))
    else:
        sys.exit(f"error: {path} holds neither a dataset of build_dataset.py nor a model of train_model.py")
    try:
        send(Hub(), path, content, private)
    except HubError as error:
        sys.exit(f"error: {error}. {path} is saved and complete here; this pushes it: {shlex.join(again)}")


def diverged(results_path: Path) -> bool:
    """Whether the results file says that the run diverged; False if the file is missing or damaged."""
    try:
        return record.read_json(results_path).get("status") == "diverged"
    except (OSError, ValueError, AttributeError):
        return False


def push_model(hub: Hub, folder: Path, content: tuple[dict, dict | None], private: bool) -> None:
    """Push a model folder with its card. `content` is the result of `read_model`."""
    config, results = content
    run = folder.absolute().name if results is None else results["run"]
    repo = f"{hub.namespace}/{run}"
    card = model_card(repo, config, results)
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [entry.name for entry in folder.iterdir() if entry.is_file() and MODEL_FILES.fullmatch(entry.name)]
    test = results is not None and bool(results.get("test_pipeline"))
    stale = ["*.safetensors", "model.safetensors.index.json", "softmax1.py"]
    upload(hub, repo, "model", folder, files, stale, test, private)


def read_model(folder: Path, results_path: Path) -> tuple[dict, dict | None]:
    """config.json and the results file, if any. Exits with one line if they are damaged or do not belong together."""
    try:
        config = record.read_json(folder / "config.json")
        weights = sorted(folder.glob("model*.safetensors"))
        for file in weights:
            safe_open(file, "pt").keys()
        files = ["tokenizer.json", "tokenizer_config.json"]
        if config["model_type"] not in ("roberta", "roberta-softmax-n"):
            raise ValueError(f"a {config['model_type']} is a control of the experiment, and not for the Hub")
        if config["model_type"] == "roberta-softmax-n":
            files.append("softmax1.py")
            if "AutoModelForMaskedLM" not in config.get("auto_map", {}):
                raise ValueError("no auto_map in config.json")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing or not weights:
            raise ValueError(f"no {(missing or ['model.safetensors'])[0]}")
        model_card(f"user/{folder.name}", config, None)
    except (OSError, *WRONG, SafetensorError) as error:
        sys.exit(f"error: {folder} holds no complete model ({record.one_line(error)}): train it again")
    if not results_path.is_file():
        print(f"note: there is no {results_path}, so the card of {folder} has no figures", file=sys.stderr)
        return config, None
    try:
        results = record.read_json(results_path)
        n, run = results["softmax_n"], results["run"]
        model_card(f"user/{run}", config, results)
    except (OSError, *WRONG) as error:
        sys.exit(f"error: {results_path} is not a results file ({record.one_line(error)}): give the right --results")
    if n != config.get("softmax_n", 0.0):
        sys.exit(f"error: {results_path} ({run}, n = {n}) is not about the model in {folder}: give the right --results")
    return config, results


def read_dataset(folder: Path) -> tuple[dict, dict[str, datasets.Dataset]]:
    """manifest.json and the splits. Exits with one line if they are damaged or do not belong together."""
    try:
        manifest = record.read_json(folder / "manifest.json")
        splits = {split: datasets.Dataset.load_from_disk(folder / split) for split in ("train", "validation")}
        for split, dataset in splits.items():
            if len(dataset) != manifest["splits"][split]["samples"]:
                raise ValueError(f"{len(dataset):,} samples in {split}, manifest.json has another number")
        dataset_card(f"user/{DATASET}", manifest, splits)
    except (OSError, *WRONG) as error:
        sys.exit(f"error: {folder} holds no complete dataset ({record.one_line(error)}): run build_dataset.py")
    return manifest, splits


def push_dataset(hub: Hub, folder: Path, content: tuple[dict, dict[str, datasets.Dataset]], private: bool) -> None:
    """Push Parquet files and the card in one commit, with at most one batch of rows in memory.

    `content` is the result of `read_dataset`.
    """
    manifest, splits = content
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
    """Create the repository if it does not exist, and push `files` in one commit, which is complete or absent.

    Args:
        hub: the client.
        repo: "namespace/name".
        kind: "model" or "dataset".
        folder: the folder of the files.
        files: their names relative to it.
        stale: patterns of files that are deleted from the repository if they are not among `files`.
        test: whether this is a test run, which may replace only another test run.
        private: refuse a public repository.
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
    hub.call(
        hub.api.upload_folder,
        repo_id=repo,
        repo_type=kind,
        folder_path=folder,
        allow_patterns=files,
        delete_patterns=stale,
        commit_message=f"Push {repo.split('/')[1]}",
    )
    print(f"{kind} {repo} is on the Hub: {hub.api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}")


# --------------------------------------------------------------------------------------------------------------- main


def check(optional: bool = False) -> str:
    """The namespace for pushes. Exits with one line if the token may not write there: call it before any work.

    With `optional`, missing credentials mean that nothing will be pushed, and the exit status is UNSET.
    """
    try:
        return Hub().namespace
    except HubError as error:
        if optional and isinstance(error, NoCredentials):
            print("Nothing will be pushed to the Hub: HUGGINGFACE_TOKEN and HUGGINGFACE_USER are not both set.")
            sys.exit(UNSET)
        sys.exit(f"error: {error}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="check that HUGGINGFACE_TOKEN may write for HUGGINGFACE_USER")
    checking.add_argument(
        "--optional",
        action="store_true",
        help=f"end with status {UNSET} if they are not both set, because nothing will be pushed",
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
        print(f"The token may write for {check(args.optional)}.")
    else:
        push(args.path, args.results, args.private)


if __name__ == "__main__":
    command.run(main)
