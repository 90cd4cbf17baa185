"""One upload: what it says when it fails, and what of a repository it leaves as it is."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.hub import Target, upload
from opefo_trl.hub.outbox import files_to_publish
from opefo_trl.hub.upload import LONGEST_WAIT, UploadError, explain, push, without_secrets


def push_run(run, message="end", **options):
    """Push the run without its checkpoints; return the error."""
    try:
        push(Target("model", **options), files_to_publish(run, [], "end"), message)
    except UploadError as error:
        return error


def test_a_reason_is_one_line_and_says_whether_a_retry_may_help():
    down = explain(HTTPError("refused\nby all"))
    assert "cannot be reached" in str(down) and "refused by all" in str(down) and down.wait == 0
    assert explain(ValueError("bad card")).wait > LONGEST_WAIT
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = HTTPError("slow")
    assert "slow" in str(explain(wrapped))
    assert str(explain(UploadError("no room", 7.0))) == "no room" and explain(UploadError("no room", 7.0)).wait == 7


def test_no_token_gets_into_a_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    words = "train.py --hub_token abc --hub-token=def --push-to-hub-token ghi --name my-own-token --flow_target 0.4x"
    text = without_secrets(words)
    assert "0.4x" in text and not any(secret in text for secret in ("abc", "def", "ghi", "my-own-token"))
    config = "lr: 1\n  hub_token: abcdef\nuse: hf_" + "a" * 34 + "\n{'hub_token': x, a: known}"
    assert without_secrets(config, "known", None) == "lr: 1\n  hub_token: ***\nuse: ***\n{'hub_token': ***, a: ***}"
    assert "given" not in str(explain(ValueError("token given"), "given"))


def test_the_client_has_time_outs_and_a_users_own_stays(monkeypatch):
    factories = []
    monkeypatch.setattr(huggingface_hub, "set_client_factory", factories.append)
    unlimited = type(huggingface_hub.get_session())(timeout=None, event_hooks={"request": [print]})
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: unlimited)
    upload.set_timeouts()
    client = factories.pop()()
    assert client.timeout.read == client.timeout.write == upload.SILENCE and client.timeout.connect <= 10
    assert client.event_hooks["request"] == [print] and client.follow_redirects
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    upload.set_timeouts()
    assert factories == []


@pytest.mark.slow
def test_publishing_loads_no_torch():
    code = "import sys, opefo_trl.hub.__main__; assert not {'torch', 'transformers', 'trl', 'pandas'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_private_repository_and_what_somebody_wrote_stay(hub, run):
    hub.make("alice/model", private=True)
    hub.write("alice/model", "README.md", "---\nlicense: mit\ntags: [mine]\n---\n\n# By hand\n\nKeep this.\n")
    (run / "README.md").write_text(f"{(run / 'README.md').read_text()}\n\nLocal words.\n")
    for message in ("first", "second"):
        push_run(run, message)
    card = ModelCard(hub.files("alice/model")["README.md"].decode())
    assert hub.repos["alice/model"].private
    for text in ("# By hand\n\nKeep this.", "Local words.", "# model"):
        assert card.text.count(text) == 1
    assert card.data.license == "mit" and card.data.tags == ["mine", "opefo"]


@pytest.mark.slow
def test_a_new_repository_is_private_if_asked_for_and_its_licence_is_the_base_models(hub, run):
    hub.write("bob/base", "README.md", "---\nlicense: other\nlicense_name: own\n---\n")
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("tags: [opefo]", "tags: [opefo]\nbase_model: bob/base"))
    push_run(run, private=True, revision="try")
    assert hub.repos["alice/model"].private and hub.commits("alice/model") == []
    files = hub.files("alice/model", "try")
    data = ModelCard(files["README.md"].decode()).data
    assert "model.safetensors" in files and (data.license, data.license_name) == ("other", "own")
    assert hub.count("card")  # validated by the Hub before it was taken


@pytest.mark.slow
def test_a_last_checkpoint_is_replaced_as_a_whole_and_without_a_pool_of_threads(hub, run, monkeypatch):
    """The end of the process would wait for the threads of a pool, which may hang."""
    monkeypatch.delattr(ThreadPoolExecutor, "submit")
    (run / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"of a rank that is gone")
    push(Target("model"), files_to_publish(run, [run / "checkpoint-2"], "checkpoint"), "step 2")
    assert "last-checkpoint/rng_state_1.pth" in hub.files("alice/model")
    push(Target("model"), files_to_publish(run, checkpoints(run), "checkpoint"), "step 10")
    files = hub.files("alice/model")
    assert "last-checkpoint/rng_state_1.pth" not in files and files["last-checkpoint/optimizer.pt"] == b"\x0a" * 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "content", "reasons"),
    [
        ("README.md", "---\nlicense: [\n---\n# By hand\n", ["README.md"]),
        ("README.md", "---\n- not a map\n---\n", ["README.md"]),
        ("README.md", "---\ntags: 7\n---\n", ["README.md"]),
        (".gitignore", "*.html\n", ["report.html", ".gitignore"]),
    ],
)
def test_a_broken_card_and_ignored_files_keep_no_weights_back(hub, run, path, content, reasons):
    hub.write("alice/model", path, content)
    error = push_run(run)
    assert all(reason in str(error) for reason in reasons) and (error.wait > LONGEST_WAIT) == (path == "README.md")
    files = hub.files("alice/model")
    assert files[path].decode() == content and "model.safetensors" in files


@pytest.mark.slow
@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_file_with_another_hash_is_missed(hub, run, path, monkeypatch):
    real = hub._paths

    def damaged(request, name, revision):
        files = hub.repos[name].commit(revision).files
        files[path] = b"something else"
        return real(request, name, revision)

    monkeypatch.setattr(hub, "_paths", damaged)
    assert path in str(push_run(run))
