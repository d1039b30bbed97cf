"""A push against a server that speaks as the Hub does: what arrives, and what happens when it fails."""

import json
import os
import shutil

import pytest
import yaml

from hf_efficient import CheckpointError, ConfigError, push

from ..commands import cli
from ..families import make_model
from ..reporting.samples import sample_report
from .hub_server import serving

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    make_model("bert").save_pretrained(folder)
    sample_report().save(folder)
    (folder / "README.md").write_text("old card")
    (folder / "accuracy_latency.png").write_bytes(b"png")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not for others")
    (folder / "stage.json").write_text("{}")
    return folder.parent


@pytest.fixture
def result(run, tmp_path):
    """As a run leaves it: `model` in the folder of the run, with what must stay behind."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch):
    """Where nobody waits before trying again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks the older protocol, LFS
    monkeypatch.setattr(_http, "is_offline_mode", lambda: False, raising=False)
    with serving() as hub:
        yield hub


def go(result, hub, **options):
    waits = []
    return push(result, "me/fast", token=TOKEN, endpoint=hub.url, wait=waits.append, **options), waits


def test_all_of_it_arrives_in_one_commit(result, hub):
    done, waits = go(result, hub)
    [commit] = hub.commits
    assert set(commit) == set(done.files) and done.url == f"{hub.url}/me/fast" and not waits
    names = {
        "config.json",
        "model.safetensors",
        "report.json",
        "report.html",
        "README.md",
        "recipe.yaml",
        "onnx/model.onnx",
    }
    assert names | {"accuracy_latency.png"} <= set(commit)
    assert not any(name.startswith(".") or name == "stage.json" for name in commit)
    assert commit["model.safetensors"] == (result / "model" / "model.safetensors").read_bytes()
    assert b'from_pretrained("me/fast")' in commit["README.md"] and b"accuracy_latency.png" in commit["README.md"]
    assert yaml.safe_load(commit["recipe.yaml"]) == sample_report().recipe
    assert (result / "model" / "README.md").read_text() == "old card"
    assert all(TOKEN.encode() not in content for content in commit.values())


@pytest.mark.parametrize("private", [True, False])
def test_it_is_private_unless_told_otherwise(result, hub, private):
    done, _ = go(result, hub, **({} if private else {"private": False}))
    assert hub.repos == {"me/fast": private} and done.private is private


def test_a_repository_that_is_there_stays_what_it_is(result, hub):
    hub.repos["me/fast"] = False
    done, _ = go(result, hub)
    assert hub.repos == {"me/fast": False} and len(hub.commits) == 1
    assert done.private is False  # and this is told


def test_a_dry_run_talks_to_nobody(result, hub):
    done, _ = go(result, hub, dry_run=True)
    assert not hub.requests and done.url is None
    assert done.files["model.safetensors"] == (result / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("where", ["/commit/", "/api/repos/create"])
def test_a_fault_of_the_server_is_tried_again(result, hub, where):
    hub.fail[where] = [500, 502]
    _, waits = go(result, hub)
    assert len(hub.commits) == 1 and waits == [2.0, 4.0]


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_a_dropped_connection_is_tried_again(result, hub, where):
    hub.fail[where] = [0]
    _, waits = go(result, hub)
    assert len(hub.commits) == 1 and len(waits) <= 1  # huggingface_hub tries some of them again by itself
    assert hub.called(where) >= 2


def test_a_file_whose_upload_breaks_off_is_sent_again(result, hub):
    hub.fail["/store/"] = [500, 0]
    go(result, hub)
    assert hub.called("/store/") == 4  # two files
    [commit] = hub.commits
    assert commit["model.safetensors"] == (result / "model" / "model.safetensors").read_bytes()


def test_a_busy_server_says_how_long_to_wait(result, hub):
    hub.fail["/api/repos/create"] = [429]
    _, waits = go(result, hub)
    assert waits == [7.0] and len(hub.commits) == 1


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", "a-secret-of-another-kind"])
def test_no_token_of_any_kind_is_shown(result, hub, token, caplog, capfd):
    caplog.set_level("DEBUG")
    hub.fail["/commit/"] = [403]
    with pytest.raises(CheckpointError) as caught:
        push(result, "me/fast", token=token, endpoint=hub.url, wait=lambda seconds: None)
    shown = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert token.strip() not in shown and "write access" in shown


def test_what_needs_the_package_comes_with_its_loader(hub, tmp_path):
    from transformers import AutoModelForTokenClassification

    from hf_efficient import AttentionConfig, convert_attention

    folder = tmp_path / "model"
    model = convert_attention(make_model("bert"), AttentionConfig(kind="local", window=4))
    model.save_pretrained(folder)
    sample_report().save(folder)
    go(folder, hub)
    received = tmp_path / "received"
    received.mkdir()
    for name, content in hub.commits[0].items():
        (received / name).write_bytes(content)
    assert (received / "modeling_hf_efficient.py").is_file()
    loaded = AutoModelForTokenClassification.from_pretrained(received)
    assert type(loaded) is type(model)
    assert all((loaded.state_dict()[name] == value).all() for name, value in model.state_dict().items())


def test_what_was_uploaded_is_not_sent_again(result, hub):
    hub.fail["/commit/"] = [400]
    with pytest.raises(CheckpointError):
        go(result, hub)
    sent = hub.called("/store/")
    assert sent == 2 and not hub.commits  # weights and graph
    go(result, hub)
    assert hub.called("/store/") == sent and len(hub.commits) == 1


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "write access"), (404, "no such user")])
def test_a_refusal_says_what_to_do_and_shows_no_token(result, hub, status, words):
    hub.fail["/api/repos/create"] = [status] * 9
    with pytest.raises(CheckpointError, match=words) as caught:
        go(result, hub)
    assert TOKEN not in str(caught.value) and not hub.commits
    assert hub.called("/api/repos/create") == 1


def test_a_server_that_stays_down_is_given_up(result, hub):
    hub.fail["/commit/"] = [503] * 99
    with pytest.raises(CheckpointError, match="push again later") as caught:
        go(result, hub)
    assert TOKEN not in str(caught.value)


def test_nobody_there(result, hub):
    with pytest.raises(CheckpointError, match="push again later"):
        push(result, "me/fast", token=TOKEN, endpoint="http://127.0.0.1:9", wait=lambda seconds: None)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "fast",
            "me/fast/x",
            "../fast",
            "me/",
            "me/fa st",
            "",
            "me/a---b",
            "m--e/a",
            "me/...a",
            "me/.a",
            "me/-a",
            "-/a",
        ),
        *("me./a", "me-/a", "me/b.git", "mé/a", "me/名", "spaces/x", "api/models", f"me/{'x' * 97}", "me/a\n"),
    ],
)
def test_a_name_that_cannot_be(result, hub, name):
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="user/name"):
            go_as(result, hub, name, dry_run=dry_run)
    assert not hub.requests


@pytest.mark.parametrize("name", ["me/fast", "Me-2/a.b_c-D", "m_e/9", f"me/{'x' * 90}"])
def test_a_name_that_can(result, hub, name):
    assert go_as(result, hub, name, dry_run=True).files.keys() == go_as(result, hub, name).files.keys()
    assert hub.repos == {name: True}


def go_as(result, hub, name, **options):
    return push(result, name, token=TOKEN, endpoint=hub.url, wait=lambda seconds: None, **options)


SECRETS = [
    "hf_abc\ndef",
    "hf_abc def",
    "hf_\u00e4bc",
    "hf_abc\x00",
    "hf_abc\tdef",
    "\u200bhf_abc",
    "hf_abc\r\nX-Evil: 1",
]


@pytest.mark.parametrize("secret", SECRETS, ids=range(len(SECRETS)))
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(result, hub, secret, dry_run, caplog, capfd):
    caplog.set_level("DEBUG")
    with pytest.raises(ConfigError, match="Copy it again") as caught:
        push(result, "me/fast", token=secret, endpoint=hub.url, dry_run=dry_run)
    shown = str(caught.value) + repr(caught.value.__context__) + caplog.text + "".join(capfd.readouterr())
    assert "hf_" not in shown and "abc" not in shown and not hub.requests


def test_nor_is_one_of_the_environment(result, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "first-half second-half")
    with pytest.raises(ConfigError, match="Copy it again") as caught:
        push(result, "me/fast", endpoint=hub.url, dry_run=True)
    assert "half" not in str(caught.value)


NONSENSE = [b"", b"<html>Log in to the hotel</html>", b"[]", b"null", b'"text"', b"{}", b"3", b"\xff\xfe", b"[" * 9999]


@pytest.mark.cover
@pytest.mark.parametrize("answer", NONSENSE, ids=range(len(NONSENSE)))
@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/api/models/me/fast", "/preupload/", "/objects/batch", "/commit/"]
)
def test_an_answer_that_no_hub_gives(result, hub, where, answer):
    """An error in one message, or a push that arrived: never a traceback, never half."""
    hub.fail[where] = [answer] * 9
    try:
        _, waits = go(result, hub)
    except CheckpointError as error:
        assert "me/fast" in str(error) and ("as the Hub does" in str(error) or "push again later" in str(error))
        assert TOKEN not in str(error) and not hub.commits
    else:
        assert len(hub.commits) == 1 and not waits and where in ("/api/models/me/fast", "/api/repos/create")


def test_a_server_that_never_answers_is_given_up(result, hub, monkeypatch):
    monkeypatch.setattr("hf_efficient.pipeline.hub.PATIENCE", 0.2)
    monkeypatch.setattr("hf_efficient.pipeline.hub.TRIES", 2)
    shutil.rmtree(result / "model/onnx")  # one file to upload, not two
    for where in ("/api/repos/create", "/api/models/me/fast", "/store/", "/commit/"):
        hub.fail = {where: [-1] * 99}
        with pytest.raises(CheckpointError, match="push again later"):
            go(result, hub)
        assert hub.called(where) >= 2 and not hub.commits
    hub.fail = {}
    go(result, hub)
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        *(
            ("0", 2.0),
            ("9", 9.0),
            ("99999999999999999999", 300.0),
            ("-5", 2.0),
            ("1e3", 2.0),
            ("\u00b2", 2.0),
            ("x", 2.0),
        ),
        *(("Wed, 21 Oct 2015 07:28:00 GMT", 2.0), ("Wed, 21 Oct 2915 07:28:00 GMT", 300.0), ("Wed, 99 Oct 2015", 2.0)),
    ],
)
def test_a_busy_server_cannot_ask_for_everything(result, hub, asked, expected):
    hub.fail["/api/repos/create"], hub.retry_after = [429], asked
    _, waits = go(result, hub)
    assert waits == [expected] and len(hub.commits) == 1


@pytest.mark.parametrize("asked", ["99999999999", "\u00b9", "9 days"])
def test_nor_of_the_client_below(result, hub, asked, monkeypatch):
    """Uploads are tried again by huggingface_hub itself, which would believe any number."""
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    hub.fail["/store/"], hub.retry_after = [429], asked
    go(result, hub)
    assert len(hub.commits) == 1 and len(slept) == 1 and slept[0] <= 301


def test_the_client_is_as_it_was_after_a_push(result, hub):
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    go(result, hub)
    assert _http._GLOBAL_CLIENT_FACTORY is before


def test_a_file_name_that_is_not_utf_8(result, hub):
    path = os.fsencode(result / "model") + b"/a\xff.txt"
    with open(path, "w") as file:
        file.write("x")
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match="Rename or remove it"):
            go(result, hub, dry_run=dry_run)
    os.unlink(path)
    go(result, hub)


def test_a_folder_without_a_result(result, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="No readable report"):
        push(tmp_path, "me/fast")
    (result / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model"):
        push(result, "me/fast")


def test_offline_is_said(result):
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        push(result, "me/fast")


def test_the_command(result, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
    line = ("push", str(result), "--repo-id", "me/fast")
    dry = cli(*line, "--dry-run", "--json")
    assert "model.safetensors" in json.loads(dry.stdout)["files"] and not hub.requests
    assert "dry run" in cli(*line, "--dry-run").stdout and not hub.requests
    done = cli(*line)
    assert done.returncode == 0, done.stderr
    assert f"Pushed: {hub.url}/me/fast (private)" in done.stdout and len(hub.commits) == 1
    assert TOKEN not in dry.stdout + dry.stderr + done.stdout + done.stderr
    assert all(TOKEN in authorization for _, path, authorization in hub.requests if "/commit/" in path)
