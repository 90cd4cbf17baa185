"""Upload files to a repository on the Hub, and check that they are there."""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub as hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import chunk_iterable, disable_progress_bars

from opefo_trl.files import CARD_FILE, LAST_CHECKPOINT_FOLDER
from opefo_trl.hub.card_blocks import card_to_push
from opefo_trl.hub.outbox import Target

SILENCE = float(os.environ.get("OPEFO_HUB_TIMEOUT", "120"))  # seconds without a byte after which a request has failed
LONGEST_WAIT = 600.0  # seconds that the Hub may ask for before somebody who waits hears that the upload failed
_REFUSED = 3600.0  # wait where a retry alone will not help
_ADVICE = {  # for a status: what to say, and how long to wait
    401: ("does not accept the token: log in with `hf auth login`, or set HF_TOKEN", _REFUSED),
    403: ("needs a token with the role `write`", _REFUSED),
    429: ("asks to wait", 60.0),
    **dict.fromkeys((402, 413, 507), ("has no room left", _REFUSED)),
    **dict.fromkeys((400, 404, 422), ("refuses", _REFUSED)),
}


class UploadError(RuntimeError):
    """The reason why an upload failed, in one line without tokens, and the seconds to wait before a retry."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def set_timeouts() -> None:
    """Give huggingface_hub's client time-outs: by itself it has none. A client of the user's own with some stays."""
    client = hub.get_session()  # of httpx in huggingface_hub 1, of httpx2 in 2
    if client.timeout.read is None:
        timeout, hooks = (min(SILENCE, 10.0), SILENCE, SILENCE, None), client.event_hooks  # connect, read, write, pool
        hub.set_client_factory(lambda: type(client)(follow_redirects=True, timeout=timeout, event_hooks=hooks))
    warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")


def push(to: Target, files: Mapping[str, Path], message: str, token: str | None = None) -> tuple[str, Any]:
    """
    Commit `files`, by their paths in the repository, which is created if need be, and check their hashes on the Hub.
    Returns the repository with its owner, and the `CommitInfo`. A card that is broken keeps no other file back.
    """
    set_timeouts()
    disable_progress_bars()  # there would be one for each file
    try:
        token = token or hub.get_token()
        if token is None or hub.is_offline_mode():
            reason = "there is no token: log in with `hf auth login`, or set HF_TOKEN"
            raise UploadError("HF_HUB_OFFLINE is set" if token else reason, _REFUSED)
        api = hub.HfApi(token=token, library_name="opefo_trl", library_version=version("opefo_trl"))
        to = replace(to, repo=api.create_repo(to.repo, private=to.private, exist_ok=True).repo_id)
        if to.revision is not None and not to.revision.startswith("refs/"):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        additions = [hub.CommitOperationAdd(path, source) for path, source in files.items() if path != CARD_FILE]
        for addition in additions:
            # One by one: for several, huggingface_hub starts threads, which the end of the process would wait for
            api.preupload_lfs_files(to.repo, [addition], revision=to.revision, free_memory=False)
        try:
            return to.repo, _commit(api, to, message, additions, files.get(CARD_FILE)) if files else None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if CARD_FILE not in files:
                raise
            _commit(api, to, message, additions, None)
            raise UploadError(f"all is there except the card, {CARD_FILE}: {error}", _REFUSED) from None
    except Exception as error:
        raise explain(error, token) from None


def _commit(api: Any, to: Target, message: str, files: Sequence[Any], card: Path | None) -> hub.CommitInfo:
    """Commit and verify. If somebody else commits meanwhile, the Hub refuses (412) and the upload is retried."""
    info, additions, hub_card = api.model_info(to.repo, revision=to.revision), [*files], None
    existing, new = {entry.rfilename for entry in info.siblings}, {addition.path_in_repo for addition in files}
    if card is not None:
        if CARD_FILE in existing:
            with TemporaryDirectory() as cache:  # the user's cache may be read-only
                file = api.hf_hub_download(to.repo, CARD_FILE, revision=info.sha, cache_dir=cache)
                hub_card = Path(file).read_text(encoding="utf-8")
        text = card_to_push(card.read_text(encoding="utf-8"), to.repo, hub_card)
        additions.append(hub.CommitOperationAdd(CARD_FILE, text.encode()))
    # Files of an older `last-checkpoint` that the new one does not have
    replaced = {path.split("/")[0] for path in new} & {LAST_CHECKPOINT_FOLDER}
    stale = [hub.CommitOperationDelete(path) for path in sorted(existing - new) if path.split("/")[0] in replaced]
    branch = {"revision": to.revision, "parent_commit": info.sha}
    commit = api.create_commit(to.repo, [*additions, *stale], commit_message=message, **branch)
    _verify(api, to.repo, commit.oid, {addition.path_in_repo: addition for addition in additions})
    return commit


def _verify(api: Any, repo: str, commit: str, missing: dict[str, Any]) -> None:
    """Compare each file's hash with the Hub's, which takes a commit even if .gitignore excludes some of the files."""
    for paths in chunk_iterable([*missing], 500):
        for entry in api.get_paths_info(repo, list(paths), revision=commit):
            with missing[entry.path].as_file() as file:
                content = b"" if entry.lfs else file.read()
            git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sha256 = missing[entry.path].upload_info.sha256.hex()
            if (entry.lfs.sha256 == sha256) if entry.lfs else (entry.blob_id == git_hash):
                del missing[entry.path]
    if missing:
        some = ", ".join([*missing][:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UploadError(f"the Hub took the commit, but does not have {some} as sent: does .gitignore exclude them?")


def explain(error: BaseException, token: str | None = None) -> UploadError:
    """Turn any error of an upload into its reason, and say when a retry may help."""
    while error.__cause__ is not None and isinstance(error, (RuntimeError, LocalEntryNotFoundError)):
        error = error.__cause__  # huggingface_hub wraps what went wrong with a file
    reason, wait = f"{type(error).__name__}: {error}", _REFUSED if isinstance(error, ValueError) else 0.0
    if isinstance(error, UploadError):
        reason, wait = str(error), error.wait
    elif isinstance(error, HfHubHTTPError):
        advice, wait = _ADVICE.get(error.response.status_code, ("failed", 0.0))
        reason = f"the Hub {advice} ({error.response.status_code}): {error.server_message or error}"
        after = error.response.headers.get("Retry-After", "")
        wait = float(after) if after.isdigit() else wait
    elif isinstance(error, HTTPError):
        reason = f"the Hub cannot be reached ({reason})"
    return UploadError(without_secrets(" ".join(reason.split()), token), wait)


def without_secrets(text: str, *tokens: str | None) -> str:
    """Replace tokens in a text by ***: known ones, the values of `hub_token` options, and what looks like one."""
    with suppress(Exception):
        tokens = (*tokens, hub.get_token())
    for token in filter(None, (*tokens, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(token, "***")
    text = re.sub(r"((?:push[-_]to[-_])?hub[-_]token['\"]?\s*[:= ]\s*)[^\s,}]+", r"\1***", text)
    return re.sub(r"\bhf_\w{20,}", "***", text)
