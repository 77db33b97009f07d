"""hub.py and the model folder: real clients with a Hub on loopback and faults; new processes; exports."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import huggingface_hub
import onnx
import onnxruntime
import pytest
import torch
from accelerate import init_empty_weights
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import build_dataset
import cards
import experiment
import hub
import softmax1
import train_model
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM, RobertaSoftmaxNModel

ROOT = Path(__file__).parent.parent
TOKEN = "hf_SaluTonMondoSekreto123"
NS = [0.0, 1.0, 0.5, "learned"]


# ------------------------------------------------------------------------------------------------- models and a server


def make_model(n: float | str, vocab_size: int = 1024, layers: int = 2):
    settings = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1, "initializer_range": 0.1}
    torch.manual_seed(0)
    if n == 0:
        return RobertaForMaskedLM(RobertaConfig(softmax_n=0.0, **settings)).eval()
    model = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(softmax_n=n, **settings)).eval()
    for log_n in softmax1.learned_sinks(model).values():
        log_n.data = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    return model


def make_results(n: float, run: str, test_pipeline: bool = False) -> dict:
    """Results in the form of train_model.py, with figures that can be recognized in the card."""
    weights = {f"roberta.encoder.layer.{i}.attention.output.dense.weight": 1.0 + 2 * i for i in range(2)}
    activations = {f"roberta.encoder.layer.{i}.output.dense": 10.0 * i for i in range(2)}
    activations |= {f"roberta.encoder.layer.{i}.attention.output.dense": 100.0 + i for i in range(2)}
    return {
        "run": run,
        "softmax_n": n,
        "seed": 42,
        "test_pipeline": test_pipeline,
        "settings": {"learning_rate": 5e-5, "mlm_probability": 0.15, "max_length": 512, "optim": "adamw_torch"},
        "effective_batch_size": 16,
        "dataset": {"sources": ["oscar", "epo_web_2012_1M"], "train_samples": 4_574_369, "sha256": "ab" * 32},
        "hardware": {"name": "NVIDIA A10G", "count": 1},
        "training": {"steps": 285_899, "loss_mean": 4.4567, "wall_seconds": 3600.0, "tokens": 12_345},
        "validation": {"loss": 3.25, "perplexity": math.exp(3.25), "masked_tokens": 777},
        "weight_excess_kurtosis": weights,
        "activation_excess_kurtosis": {**activations, "roberta": None},
    }


@pytest.fixture(scope="session")
def folders(sample, tmp_path_factory):
    """{n: model folder in the form of train_model.py}, each with results/<run>.json next to models/."""
    folder_of = {}
    for n in NS:
        base = tmp_path_factory.mktemp("project")
        run = experiment.run_name(n, 42)
        folder = base / "models" / run
        make_model(n).save_pretrained(folder)
        AutoTokenizer.from_pretrained(sample / "tokenizer").save_pretrained(folder)
        (folder / "training_args.bin").write_bytes(b"pickle")
        (folder / "checkpoint-3").mkdir()
        (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"x" * 20_000)
        (base / "results").mkdir()
        (base / "results" / f"{run}.json").write_text(json.dumps(make_results(n, run)))
        folder_of[n] = folder
    return folder_of


@pytest.fixture
def pauses(monkeypatch):
    """The requested pauses; time.sleep returns at once."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture
def server(monkeypatch, tmp_path, pauses):
    """A Hub for new processes, by HF_ENDPOINT, and for the clients of this process, which were imported before."""
    server = HubServer(part_bytes=60_000)
    server.user(TOKEN, "zamenhof", orgs=(("asocio", "write"), ("legantoj", "read")))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HUGGINGFACE_TOKEN": TOKEN,
        "HUGGINGFACE_USER": "zamenhof",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def run_code(code: str, *arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run code in a new process that has only installed packages: -I removes this project from sys.path."""
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def fails(call) -> str:
    """The one line with which `call` ends."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert TOKEN not in message
    return message


def assert_no_token(server: HubServer, folder: Path, *printed: str) -> None:
    """The token is in no file below `folder` except .env and the tests, in no request, and in no printed text.

    There is no pickle of Trainer either.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".env" and "tests" not in path.parts]
    assert len(files) > 5 and not [path for path in files if path.name == "training_args.bin"]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not any(TOKEN.encode() in body for body in server.bodies)
    assert not any(TOKEN in text for text in printed)


def printed_command(message: str) -> list[str]:
    """The arguments of the command `python hub.py ...` at the end of a message."""
    return shlex.split(message.rpartition("python hub.py ")[2])


# ------------------------------------------------------------------------------------------------------- round trip

FRESH = """
import json, sys
import torch
from datasets import load_dataset
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, RobertaForMaskedLM, pipeline)

assert not any(name in sys.modules for name in ("softmax1", "hub"))
found = {}
for n, arm in {0.0: "softmax0", 1.0: "softmax1", 0.5: "softmax0.5", "learned": "softmax_learned"}.items():
    name = f"zamenhof/esperberto-{arm}"
    trust = {} if n == 0 else {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(["La suno <mask>.", "Saluton, kara mondo kaj <mask>!"], padding=True, return_tensors="pt")
    model = AutoModelForMaskedLM.from_pretrained(name, **trust).eval()
    with torch.no_grad():
        torch.save((dict(inputs), model(**inputs).logits), f"{n}.pt")
    classes = [model]
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        tuned = auto.from_pretrained(name, **trust)
        tuned.save_pretrained("tuned")
        classes += [tuned, auto.from_pretrained("tuned", **trust)]
    half = AutoModelForMaskedLM.from_pretrained("tuned", dtype=torch.bfloat16, attn_implementation="sdpa", **trust)
    answers = pipeline("fill-mask", model=name, **trust)("La suno <mask>.")
    found[n] = {
        "n": [model.config.softmax_n for model in [*classes, half]],
        "attention": [model.config._attn_implementation for model in [*classes, half]],
        "types": [type(model).__name__ for model in classes],
        "answers": [answer["score"] for answer in answers],
    }
    if n:
        for call in (
            lambda: AutoModelForMaskedLM.from_pretrained(name),
            lambda: AutoModel.from_pretrained(name, trust_remote_code=False),
            lambda: pipeline("fill-mask", model=name),
            lambda: RobertaForMaskedLM.from_pretrained(name),
            lambda: RobertaForMaskedLM.from_pretrained("tuned", attn_implementation="eager"),
        ):
            try:
                call()
                found[n]["lost"] = True
            except (ValueError, KeyError):
                pass
        # The second guard alone, in case a later transformers uses the key of the first guard.
        config = json.load(open("tuned/config.json"))
        config["hidden_act"] = "gelu"
        json.dump(config, open("tuned/config.json", "w"))
        code = "from transformers import RobertaModel; RobertaModel.from_pretrained('tuned')"
        import subprocess
        result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
        assert result.returncode and 'attn_implementation="softmax_n"` is not supported' in result.stderr, result.stderr
data = load_dataset("zamenhof/esperanto")
found["data"] = {split: list(data[split]["text"]) for split in data}
json.dump(found, open("found.json", "w"))
"""


@pytest.mark.slow
def test_round_trip_in_a_fresh_process(server, folders, sample, tmp_path):
    for n in NS:
        hub.main(["push", str(folders[n])])
    hub.main(["push", str(sample / "data")])
    server.fault("GET /zamenhof/esperberto-softmax0.5/resolve/.*model.safetensors", drop=True)  # in the download
    result = run_code(FRESH, cwd=tmp_path, HUGGINGFACE_TOKEN="")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not any(fault["times"] for fault in server.faults)

    found = json.loads((tmp_path / "found.json").read_text())
    for n in NS:
        inputs, logits = torch.load(tmp_path / f"{n}.pt")
        model = AutoModelForMaskedLM.from_pretrained(folders[n]).eval()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)
        there = found[str(n)]
        assert set(there["n"]) == {n} and len(there["n"]) == 8
        assert set(there["attention"]) == ({"softmax_n"} if n else {"sdpa"})
        assert all(
            name.startswith("RobertaSoftmaxN" if n else "RobertaFor") for name in there["types"] if "For" in name
        )
        assert len(there["answers"]) == 5 and "lost" not in there
    data = build_dataset.Dataset.load_from_disk(str(sample / "data" / "train"))
    assert found["data"]["train"] == data["text"][:] and found["data"]["validation"]


def test_the_content_of_a_push(server, folders, sample, capfd):
    hub.push(folders[0.5])
    hub.push(sample / "data")
    model = server.files("model", "zamenhof/esperberto-softmax0.5")
    wanted = {"config.json", "model.safetensors", "softmax1.py", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert set(model) - {".gitattributes"} == wanted
    assert model["model.safetensors"] == (folders[0.5] / "model.safetensors").read_bytes()
    assert model["softmax1.py"] == (ROOT / "softmax1.py").read_bytes()
    config = json.loads(model["config.json"])
    assert config["softmax_n"] == 0.5 and len(config["auto_map"]) == 8
    data = server.files("dataset", "zamenhof/esperanto")
    parquet = {"data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"}
    assert set(data) == parquet | {".gitattributes", "README.md"}
    assert any("/part/2" in request for request in server.requests)  # a large file was sent in parts
    everything = b"".join([*model.values(), *data.values(), *server.bodies])
    assert TOKEN.encode() not in everything and str(Path.home()).encode() not in everything
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_second_push_changes_nothing_and_old_shards_are_deleted(server, sample, monkeypatch):
    monkeypatch.setattr(hub, "SHARD_BYTES", 60_000)
    hub.push(sample / "data")
    hub.push(sample / "data")
    assert server.commits("dataset", "zamenhof/esperanto") == 1
    before = set(server.files("dataset", "zamenhof/esperanto"))
    assert len([path for path in before if "train" in path]) == 2
    monkeypatch.setattr(hub, "SHARD_BYTES", 10_000_000)
    hub.push(sample / "data")
    assert len([path for path in server.files("dataset", "zamenhof/esperanto") if "train" in path]) == 1


def test_private(server, folders):
    hub.main(["push", str(folders[1.0]), "--private"])
    assert server.repos["model", "zamenhof/esperberto-softmax1"]["private"]
    hub.push(folders[0.0])
    message = fails(lambda: hub.push(folders[0.0], private=True))
    assert "zamenhof/esperberto-softmax0 is public" in message
    assert printed_command(message) == ["push", str(folders[0.0]), "--private"]


def test_repositories_of_others_and_real_runs_are_not_overwritten(server, folders, sample, tmp_path):
    server.put(
        "dataset", "zamenhof/esperanto", {"README.md": b"---\nlanguage: eo\n---\nMy songs.\n", "songs.txt": b"la"}
    )
    assert "zamenhof/esperanto on the Hub is not of this project" in fails(lambda: hub.push(sample / "data"))
    assert set(server.files("dataset", "zamenhof/esperanto")) == {".gitattributes", "README.md", "songs.txt"}

    hub.push(folders[1.0])
    smoke = tmp_path / "smoke.json"
    smoke.write_text(json.dumps(make_results(1.0, "esperberto-softmax1", test_pipeline=True)))
    assert "a real run" in fails(lambda: hub.push(folders[1.0], smoke))
    assert server.commits("model", "zamenhof/esperberto-softmax1") == 1
    hub.push(folders[1.0])


# ----------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "pattern, status, text",
    [
        ("GET /api/whoami-v2", 401, "the Hub does not accept HUGGINGFACE_TOKEN"),
        ("POST /api/repos/create", 403, "may not do that for zamenhof"),
        ("POST /api/repos/create", 404, "the Hub does not find zamenhof"),
        ("POST .*/preupload/", 403, "may not do that for zamenhof"),
        ("POST .*/commit/", 403, "may not do that for zamenhof"),
        ("POST .*/commit/", 413, "answers HTTP 413"),
        ("PUT /lfs/", 403, "may not do that for zamenhof"),
    ],
)
def test_permanent_errors_are_not_retried(server, folders, pauses, pattern, status, text):
    server.fault(pattern, times=99, status=status)
    message = fails(lambda: hub.push(folders[1.0]))
    assert text in message and not pauses
    server.faults.clear()
    hub.main(printed_command(message))
    assert "model.safetensors" in server.files("model", "zamenhof/esperberto-softmax1")


@pytest.mark.parametrize(
    "pattern, fault, pause",
    [
        ("GET /api/whoami-v2", {"status": 429, "headers": {"Retry-After": "7"}}, 7),
        ("GET /api/whoami-v2", {"status": 429, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}, 1),
        ("POST /api/repos/create", {"status": 503}, 1),
        ("POST .*/commit/", {"status": 503, "headers": {"Retry-After": "11"}}, 11),
        ("POST .*/commit/", {"status": 429}, 2),
        ("POST .*/batch", {"status": 500}, None),
        ("PUT /lfs/", {"status": 503}, None),
        ("PUT /lfs/", {"drop": True}, None),
        ("PUT /lfs/.*/part/2", {"drop": True}, None),
        ("POST .*/commit/", {"drop": True}, 1),
        ("POST /api/repos/create", {"drop": True}, 1),
    ],
)
def test_transient_errors_are_retried(server, folders, pauses, capfd, pattern, fault, pause):
    server.fault(pattern, times=2, **fault)
    hub.push(folders[1.0])
    assert not any(fault["times"] for fault in server.faults)
    files = server.files("model", "zamenhof/esperberto-softmax1")
    assert files["model.safetensors"] == (folders[1.0] / "model.safetensors").read_bytes()
    assert server.commits("model", "zamenhof/esperberto-softmax1") == 1
    if pause:  # otherwise huggingface_hub itself waits and retries
        assert pause in pauses
        assert "trying again in" in capfd.readouterr().err


FAULTS = {f"HTTP {status}": {"status": status} for status in (400, 401, 403, 404, 409, 413, 429, 500, 502, 503, 504)}
FAULTS |= {"cut in the request": {"drop": True}, "cut in the answer": {"drop": "answer"}, "empty": {"empty": True}}
SHORT = ("HTTP 403", "HTTP 503", "cut in the answer")


@pytest.mark.parametrize(
    ("what", "faults"),
    [
        ("model", SHORT),
        pytest.param("model", [fault for fault in FAULTS if fault not in SHORT], marks=pytest.mark.slow),
        pytest.param("dataset", list(FAULTS), marks=pytest.mark.slow),
    ],
)
def test_a_fault_at_any_request_gives_one_line_at_most_and_the_next_push_is_complete(
    server, folders, sample, capfd, what, faults
):
    path, name = (folders[1.0], "esperberto-softmax1") if what == "model" else (sample / "data", "esperanto")
    repo = (what, f"zamenhof/{name}")
    server.part_bytes = 150_000  # two parts
    hub.push(path)
    whole, requests = server.files(*repo), len(server.requests)
    ended = Counter()
    for fault, skip in itertools.product(faults, range(requests)):
        for forgotten in (server.repos, server.lfs, server.parts):
            forgotten.clear()
        server.fault(".", skip=skip, **FAULTS[fault])
        try:
            hub.push(path)
            ended["whole at once"] += 1
        except SystemExit as end:
            assert end.code.startswith("error: ") and "\n" not in end.code and TOKEN not in end.code
            assert repo not in server.repos or server.files(*repo) in ({".gitattributes": b""}, whole)
            ended["one line, then whole"] += 1
            assert not server.faults[0]["times"]
            hub.push(path)
        server.faults.clear()
        assert server.files(*repo) == whole, (fault, skip)
    with capfd.disabled():
        print(f" {requests} requests, {ended.total()} faults: {dict(ended)}", end=" ")


def test_an_interrupted_push_is_completed_by_the_printed_command(server, folders, pauses):
    server.fault("PUT /lfs/.*/part/3", times=10_000, drop=True)
    message = fails(lambda: hub.push(folders[0.5]))
    assert "cannot be reached" in message and "is saved and complete here" in message
    assert server.commits("model", "zamenhof/esperberto-softmax0.5") == 0  # no part of it is visible
    assert set(hub.RETRY_SECONDS) <= set(pauses)
    sent = len([request for request in server.requests if re.fullmatch(r"PUT /lfs/\w+", request)])
    server.faults.clear()
    hub.main(printed_command(message))
    files = server.files("model", "zamenhof/esperberto-softmax0.5")
    assert all(files[name] == (folders[0.5] / name).read_bytes() for name in ("model.safetensors", "config.json"))
    # Files that were sent completely are not sent again.
    assert len([request for request in server.requests if re.fullmatch(r"PUT /lfs/\w+", request)]) == sent


def test_a_server_that_is_gone_is_retried_and_then_reported(server, sample, pauses):
    server.close()
    message = fails(lambda: hub.push(sample / "data"))
    assert "cannot be reached" in message
    assert pauses == list(hub.RETRY_SECONDS)
    again = HubServer(port=server.http.server_port)
    again.user(TOKEN, "zamenhof")
    try:
        hub.main(printed_command(message))
        assert len(again.files("dataset", "zamenhof/esperanto")) == 4
    finally:
        again.close()


def test_command_line_ends_with_one_line(server, folders, tmp_path):
    """In a new process, as for a user: exit status, one line on stderr, no traceback, no token."""
    server.fault("POST .*/commit/", times=99, status=403)
    command = [sys.executable, str(ROOT / "hub.py"), "push", str(folders[1.0])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the token may not do that for zamenhof (HTTP 403")
    assert "Traceback" not in result.stderr and TOKEN not in result.stderr + result.stdout


def test_errors_show_no_token(server, monkeypatch):
    def leak(*args, **kwargs):
        raise ValueError(f"bad header: Bearer {TOKEN}, also hf_anotherSecret9")

    api = hub.Hub()
    with pytest.raises(hub.HubError) as caught:
        api.call(leak)
    assert "<secret>" in str(caught.value)
    assert TOKEN not in str(caught.value) and "hf_another" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


# ------------------------------------------------------------------------------------------------------ token, .env


def scope(name: str, *permissions: str, kind: str = "user") -> dict:
    return {"entity": {"_id": "1", "type": kind, "name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    "user, role, scoped, error",
    [
        ("zamenhof", "write", None, None),
        ("Zamenhof", "write", None, None),
        ("asocio", "write", None, None),
        ("zamenhof", "read", None, "cannot write to repositories of zamenhof"),
        ("legantoj", "write", None, "only read access to the organisation legantoj"),
        ("nekonata", "write", None, "the token belongs to zamenhof and knows only zamenhof, asocio, legantoj"),
        ("zamenhof", "fineGrained", [scope("zamenhof", "repo.content.read", "repo.write")], None),
        ("zamenhof", "fineGrained", [scope("zamenhof", "repo.content.read")], "cannot write"),
        ("asocio", "fineGrained", [scope("zamenhof", "repo.write")], "cannot write to repositories of asocio"),
        ("asocio", "fineGrained", [scope("asocio", "repo.write", kind="org")], None),
        ("zamenhof", "fineGrained", [scope("zamenhof/esperanto", "repo.write", kind="dataset")], None),
        ("zamenhof", "fineGrained", [], "cannot write"),
    ],
)
def test_check(server, monkeypatch, capsys, user, role, scoped, error):
    server.user(TOKEN, "zamenhof", role, scoped, orgs=(("asocio", "write"), ("legantoj", "read")))
    monkeypatch.setenv("HUGGINGFACE_USER", user)
    if error:
        assert error in fails(lambda: hub.main(["check"]))
    else:
        hub.main(["check"])
        assert f"may write for {user.lower()}." in capsys.readouterr().out


def test_dotenv(server, monkeypatch, tmp_path, capsys):
    file = tmp_path / ".env"
    monkeypatch.setattr(hub, "ENV_FILE", file)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "")  # set but empty: no token, even if .env has one
    file.write_text(f"HUGGINGFACE_TOKEN={TOKEN}\nHUGGINGFACE_USER=asocio\n")
    file.chmod(0o600)
    assert "HUGGINGFACE_TOKEN is not set" in fails(lambda: hub.main(["check"]))
    monkeypatch.delenv("HUGGINGFACE_TOKEN")
    hub.main(["check"])
    output = capsys.readouterr()
    assert "zamenhof" in output.out and not output.err  # user from the environment, token from the file, no warning
    monkeypatch.delenv("HUGGINGFACE_USER")
    for mode in (0o640, 0o604):
        file.chmod(mode)
        hub.main(["check"])
        output = capsys.readouterr()
        assert "asocio" in output.out and "chmod 600 .env" in output.err and TOKEN not in output.err + output.out
    file.unlink()
    assert "HUGGINGFACE_TOKEN is not set" in fails(lambda: hub.main(["check"]))
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_ĉ")
    monkeypatch.setenv("HUGGINGFACE_USER", "zamenhof")
    assert "characters that no token has" in fails(lambda: hub.main(["check"]))
    ignored = subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=ROOT)
    assert ignored.returncode == 0


# ------------------------------------------------------------------------------------------------------------ inputs


def test_incomplete_folders_are_refused(server, folders, sample, tmp_path):
    assert "holds neither a dataset" in fails(lambda: hub.push(tmp_path))
    folder = tmp_path / "model"
    make_model(1.0).save_pretrained(folder)
    assert "no tokenizer.json" in fails(lambda: hub.push(folder))
    AutoTokenizer.from_pretrained(sample / "tokenizer").save_pretrained(folder)
    (folder / "softmax1.py").unlink()
    assert "no softmax1.py" in fails(lambda: hub.push(folder))
    (folder / "softmax1.py").write_text("")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    assert "holds no complete model" in fails(lambda: hub.push(folder))
    (folder / "model.safetensors").write_bytes(weights)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(make_results(0.0, "esperberto-softmax0")))
    assert "is not about the model" in fails(lambda: hub.push(folder, other))
    other.write_text("{")
    assert "is not a results file" in fails(lambda: hub.push(folder, other))
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_dict.json").write_text("{}")
    assert "holds no complete dataset" in fails(lambda: hub.push(data))
    assert not server.repos


# ------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("n", NS)
def test_model_card(n):
    run = experiment.run_name(n, 42)
    text = cards.model_card(f"zamenhof/{run}", make_model(n).config.to_dict(), make_results(n, run))
    card = ModelCard(text)
    assert card.data.language == "eo" and card.data.license == "apache-2.0" and card.data.pipeline_tag == "fill-mask"
    assert card.data.datasets == ["zamenhof/esperanto"] and card.data.model_name == run
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": 3.25,
        "perplexity": round(math.exp(3.25), 6),
    }
    assert all("<mask>" in widget["text"] for widget in card.data.widget) and len(card.data.widget) >= 3
    # Values 1 and 3: mean 2, population standard deviation 1; 0 and 10: mean 5, deviation 5.
    assert "| attention output: dense weight | 2 ± 1 | 1 | 3 |" in text
    assert "| FFN output: dense, activations | 5 ± 5 | 0 | 10 |" in text
    assert "| attention output: dense, activations | 100 ± 0.5 | 100 | 101 |" in text
    # The results have no activations of LayerNorms, and the card shows no other values for them.
    assert "LayerNorm" not in text.partition("dense, activations")[2].partition("## ")[0]
    for figure in ("4.4567", "3.2500", "285,899", "4,574,369", "5e-05", "15%", "oscar (OSCAR", "NVIDIA A10G", "1.00 h"):
        assert figure in text
    assert ("trust_remote_code=True" in text) == (n != 0) and run.removeprefix("esperberto-") in card.data.tags
    assert ("a learned attention sink" in text) == (n == "learned")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    assert "## Limits" in text and "A test run" not in text


def test_model_card_without_results_says_so(server, folders, tmp_path):
    folder = tmp_path / "models" / "esperberto-softmax1"
    shutil.copytree(folders[1.0], folder)
    hub.push(folder)
    text = server.files("model", "zamenhof/esperberto-softmax1")["README.md"].decode()
    assert text.count("Unknown: this model came without its results file.") == 3
    assert ModelCard(text).data.eval_results is None
    assert (folder / "README.md").read_text() == text


def test_the_card_of_a_test_run_says_so():
    results = make_results(1.0, "esperberto-softmax1", test_pipeline=True)
    text = cards.model_card("zamenhof/esperberto-softmax1", make_model(1.0).config.to_dict(), results)
    assert "A test run" in text and "test-pipeline" in ModelCard(text).data.tags


def test_dataset_card(sample):
    manifest = json.loads((sample / "data" / "manifest.json").read_text())
    splits = {
        name: build_dataset.Dataset.load_from_disk(str(sample / "data" / name)) for name in ("train", "validation")
    }
    text = cards.dataset_card("zamenhof/esperanto", manifest, splits)
    data = huggingface_hub.DatasetCard(text).data
    assert data.language == ["eo"] and data.license == "cc0-1.0" and "test-pipeline" in data.tags
    source = manifest["sources"][0]
    for figure in (f"{source['lines_read']:,}", source["sha256"], manifest["splits"]["train"]["sha256"]):
        assert figure in text
    published = copy.deepcopy(manifest)
    published["sources"] = [{**source, "name": name} for name in build_dataset.EXPECTED_LINES]
    text = cards.dataset_card("zamenhof/esperanto", published, splits)
    data = huggingface_hub.DatasetCard(text).data
    assert data.license == "other" and "test-pipeline" not in data.tags
    assert text.count("oscar-project.org") == 1 and text.count("Goldhahn") == 1 and "Common Crawl's terms" in text
    assert all(name in text for name in build_dataset.EXPECTED_LINES)
    assert cards.terms_of("my.txt") == cards.OTHER_TERMS


# ----------------------------------------------------------------------------------------------------- train, build


@pytest.fixture
def train_briefly(train):
    """train_briefly("--flag", ...) trains for two updates, into models/ and results/."""
    every_step = ("--save_steps", "1", "--eval_steps", "1")
    return lambda *flags: train("--max_length", "32", *every_step, "--output_dir", "models/<run>", *flags, steps=2)


def test_train_model_pushes_in_the_end(server, train_briefly, tmp_path, monkeypatch, capfd):
    saved = []
    monkeypatch.setattr(train_model, "delete_checkpoints", lambda *_, **__: saved.extend(Path("models").rglob("*")))
    train_briefly("--use_softmax1", "--push_to_hub", "--hub_private_repo", "true")
    assert {"optimizer.pt", "rng_state.pth", "progress.json"} <= {path.name for path in saved}
    assert_no_token(server, tmp_path, *capfd.readouterr())
    files = server.files("model", "zamenhof/esperberto-softmax1")
    results = json.loads(Path("results/esperberto-softmax1.json").read_text())
    assert files["model.safetensors"] == Path("models/esperberto-softmax1/model.safetensors").read_bytes()
    assert f"{results['validation']['loss']:.4f}" in files["README.md"].decode()
    assert server.repos["model", "zamenhof/esperberto-softmax1"]["private"]
    assert server.commits("model", "zamenhof/esperberto-softmax1") == 1  # Trainer did not push during the training
    assert results["settings"]["push_to_hub"] is True


def test_train_model_checks_the_token_first_and_keeps_the_model_when_the_push_fails(server, train_briefly, monkeypatch):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_wrongwrongwrong")
    assert "does not accept HUGGINGFACE_TOKEN" in fails(lambda: train_briefly("--push_to_hub"))
    assert not Path("models").exists()
    assert "--hub_model_id" in fails(lambda: train_briefly("--hub_model_id", "x/y"))

    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    server.fault("POST .*/commit/", times=99, status=403)
    message = fails(lambda: train_briefly("--push_to_hub", "--output_dir", "elsewhere", "--results_dir", "figures"))
    assert Path("figures/esperberto-softmax0.json").exists() and not list(Path("elsewhere").glob("checkpoint-*"))
    assert printed_command(message) == ["push", "elsewhere", "--results", "figures/esperberto-softmax0.json"]
    server.faults.clear()
    hub.main(printed_command(message))
    assert json.loads(server.files("model", "zamenhof/esperberto-softmax0")["config.json"])["softmax_n"] == 0


def test_the_push_of_a_diverged_run_is_skipped_without_an_error(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "esperberto-softmax0.json").write_text(json.dumps({"status": "diverged"}))
    hub.push(tmp_path / "models" / "esperberto-softmax0")  # there is no server, and it must not need one
    assert "esperberto-softmax0 diverged" in capsys.readouterr().out


def test_build_dataset_pushes_in_the_end(server, tmp_path, monkeypatch):
    build = ["--sample", "--validation_fraction", "0.1", "--output_dir", str(tmp_path / "data"), "--push_to_hub"]
    monkeypatch.setenv("HUGGINGFACE_USER", "nekonata")
    assert "knows only" in fails(lambda: build_dataset.main(build))
    assert not (tmp_path / "data").exists()
    monkeypatch.setenv("HUGGINGFACE_USER", "asocio")
    build_dataset.main([*build, "--hub_private_repo"])
    assert server.repos["dataset", "asocio/esperanto"]["private"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # no temporary folder is left


# ------------------------------------------------------------------------------------- the attention cannot get lost


@pytest.mark.parametrize("wrong", ["softmax", "another n", "no mask"])
def test_construction_fails_without_softmax_n_attention(monkeypatch, wrong):
    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        n = {"softmax": 0.0, "another n": 1.001, "no mask": 1.0}[wrong]
        mask = None if wrong == "no mask" else attention_mask
        return softmax1.softmax_n_attention(query, key, value, mask, scale=scaling, n=n).transpose(1, 2), None

    make_model(1.0)
    monkeypatch.setitem(AttentionInterface._global_mapping, softmax1.ATTENTION, attention)
    for model_class in set(softmax1.MODELS.values()):
        with pytest.raises(RuntimeError, match="is not softmax_n with n = 1"):
            model_class(RobertaSoftmaxNConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize("n", [0.0, 1e-3, 1e6])
def test_the_check_of_the_attention_has_no_side_effects(n):
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 99}
    config = RobertaSoftmaxNConfig(n, **sizes)
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(**sizes))
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    model = RobertaSoftmaxNForMaskedLM(config)
    assert torch.equal(torch.get_rng_state(), expected)  # no random number is drawn
    assert model.training and all(module.training for module in model.modules())
    with torch.device("meta"):
        assert RobertaSoftmaxNModel(config).embeddings.word_embeddings.weight.is_meta
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            RobertaSoftmaxNModel(config)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        RobertaSoftmaxNModel(config)
    with FakeTensorMode():
        RobertaSoftmaxNModel(config)
    with init_empty_weights(include_buffers=True):
        RobertaSoftmaxNModel(config)


@pytest.mark.parametrize("model_class", [RobertaForMaskedLM, RobertaForSequenceClassification, BertModel])
@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}])
def test_stock_classes_refuse_the_folder(folders, model_class, attention):
    with pytest.raises(KeyError, match="a softmax_n model: load it with"):
        model_class.from_pretrained(folders[1.0], **attention)


def test_the_attention_of_the_inner_model_cannot_be_changed():
    model = make_model(1.0)
    inputs = {"input_ids": torch.arange(5, 14)[None]}
    with torch.no_grad():
        expected = model(**inputs).logits
        model.roberta.set_attn_implementation("sdpa")
        model.config._attn_implementation = "eager"
        assert torch.equal(model(**inputs).logits, expected)


# ----------------------------------------------------------------------------------------------------------- exports


def padded_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    input_ids = torch.randint(5, 99, (rows, length), generator=generator)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return {"input_ids": torch.where(mask, input_ids, 1), "attention_mask": mask.long()}


def errors(logits: torch.Tensor, model, inputs: dict) -> tuple[float, float]:
    """(error of `logits` against float64, largest allowed error), for tokens that are not padding.

    Allowed is twice the error of the float32 model, plus one rounding error of the largest logit.
    """
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs).logits[real]
        truth = copy.deepcopy(model).double()(**inputs).logits[real]
    floor = torch.finfo(torch.float32).eps * truth.abs().max().item()
    return (logits[real] - truth).abs().max().item(), 2 * (plain - truth).abs().max().item() + floor


# An export takes seconds, and does the same for every n.
EXPORTED_NS = [0.5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0.0, 1.0, "learned"))]


@pytest.mark.parametrize("n", EXPORTED_NS)
@pytest.mark.filterwarnings("ignore")
def test_onnx_as_the_card_says(sample, tmp_path, monkeypatch, n):
    model = make_model(n, layers=1)
    card = cards.model_card("zamenhof/x", model.config.to_dict(), None)
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    exec(code, {"model": model, "tokenizer": AutoTokenizer.from_pretrained(sample / "tokenizer")})
    onnx.checker.check_model("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    softmax = copy.deepcopy(model) if n == 0 else make_model(0.0, layers=1)
    for rows, length in ((2, 9), (1, 3), (5, 17), (3, 1)):
        inputs = padded_batch(rows, length)
        found = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
        error, allowed = errors(found, model, inputs)
        assert error <= allowed
        if n:  # the exported model is not softmax
            error, allowed = errors(found, softmax, inputs)
            assert error > 1000 * allowed


@pytest.mark.parametrize("n", EXPORTED_NS)
def test_torch_export(n):
    model = make_model(n, layers=1)
    inputs = padded_batch(2, 9)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for rows, length in ((2, 9), (5, 17)):
        inputs = padded_batch(rows, length)
        error, allowed = errors(exported(**inputs).logits.detach(), model, inputs)
        assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", NS)
def test_half_precision(folders, n, dtype):
    """The error against float64 is at most twice that of the plain formula in the same half precision."""
    half = AutoModelForMaskedLM.from_pretrained(folders[n], dtype=dtype).eval()
    assert half.dtype == dtype and half.config.softmax_n == n
    truth = copy.deepcopy(half).double()
    plain = copy.deepcopy(half)
    plain.set_attn_implementation("softmax_n_eager" if n else "eager")
    inputs = padded_batch(3, 20)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = truth(**inputs).logits[real]
        yardstick = (plain(**inputs).logits[real] - expected).abs().max()
        error = (half(**inputs).logits[real] - expected).abs().max()
    assert error <= 2 * yardstick + torch.finfo(dtype).eps * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------- runner.sh


@pytest.mark.slow
def test_runner_pushes_models_that_a_stranger_can_use(server, tmp_path, monkeypatch):
    """runner.sh --test_pipeline in a copy of the project; at first the Hub refuses the commit of one model."""
    server.part_bytes = 5_000_000  # the weights, 29 MB, are sent in parts
    project = tmp_path / "project"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes((ROOT / name).read_bytes())
    python = project / ".venv" / "bin" / "python"  # this environment instead of a new one
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (project / ".venv" / "requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    monkeypatch.delenv("HUGGINGFACE_TOKEN")
    (project / ".env").write_text(f"HUGGINGFACE_TOKEN={TOKEN}\n")
    (project / ".env").chmod(0o600)

    def runner() -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "runner.sh", "--test_pipeline"], cwd=project, capture_output=True, text=True)

    # The report is deleted between the runs; otherwise the second would start from the beginning.
    server.fault("POST .*/esperberto-softmax1/commit/", times=99, status=403)
    result = runner()
    assert result.returncode == 1, result.stderr[-2000:]
    assert_no_token(server, tmp_path, result.stdout, result.stderr)
    assert "run this again to push it" in result.stderr and "python hub.py push" in result.stderr
    (project / "scratch" / "results" / "report.md").unlink()
    weights = (project / "scratch/models/esperberto-softmax1/model.safetensors").stat().st_mtime_ns
    server.faults.clear()
    result = runner()
    assert result.returncode == 0, result.stderr[-2000:]
    assert "are on the Hub" in result.stdout
    assert_no_token(server, tmp_path, result.stdout, result.stderr)
    assert (project / "scratch/models/esperberto-softmax1/model.safetensors").stat().st_mtime_ns == weights
    assert set(server.repos) == {
        ("dataset", "zamenhof/esperanto"),
        ("model", "zamenhof/esperberto-softmax0"),
        ("model", "zamenhof/esperberto-softmax1"),
        ("model", "zamenhof/esperberto-softmax_learned"),
    }
    code = """
from transformers import pipeline
for arm, n in {"softmax_learned": "learned", "softmax1": 1}.items():
    fill = pipeline("fill-mask", model=f"zamenhof/esperberto-{arm}", trust_remote_code=True)
    assert fill.model.config.softmax_n == n and type(fill.model).__name__ == "RobertaSoftmaxNForMaskedLM"
print(len(fill("La suno <mask>.")))
"""
    answer = run_code(code, cwd=tmp_path, HUGGINGFACE_TOKEN="")
    assert answer.stdout.strip() == "5", answer.stderr[-2000:]


@pytest.mark.parametrize(
    ("environment", "env_file", "status", "said"),
    [
        ({}, None, hub.UNSET, "Nothing will be pushed"),
        ({"HUGGINGFACE_TOKEN": TOKEN}, None, hub.UNSET, "Nothing will be pushed"),
        (
            {"HUGGINGFACE_TOKEN": ""},
            f"HUGGINGFACE_TOKEN={TOKEN}\nHUGGINGFACE_USER=zamenhof\n",
            hub.UNSET,
            "Nothing will",
        ),
        ({}, f'HUGGINGFACE_TOKEN = "{TOKEN}"\nexport HUGGINGFACE_USER=zamenhof # mine\n', 0, "may write for zamenhof"),
        ({}, "HUGGINGFACE_TOKEN=$(touch ran)\nHUGGINGFACE_USER=zamenhof\n", 1, "no token has"),
    ],
)
def test_check_optional_answers_runner(server, monkeypatch, tmp_path, capsys, environment, env_file, status, said):
    """.env is data: a command in it is not run."""
    for name in ("HUGGINGFACE_TOKEN", "HUGGINGFACE_USER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hub, "ENV_FILE", tmp_path / ".env")
    monkeypatch.chdir(tmp_path)
    if env_file:
        (tmp_path / ".env").write_text(env_file)
        (tmp_path / ".env").chmod(0o600)
    try:
        hub.main(["check", "--optional"])
        ended, message = 0, ""
    except SystemExit as end:
        ended, message = (end.code, "") if isinstance(end.code, int) else (1, end.code)
    assert ended == status and said in capsys.readouterr().out + message
    assert not (tmp_path / "ran").exists()
