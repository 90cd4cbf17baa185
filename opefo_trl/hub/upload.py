"""One attempt to bring files to a repository on the Hub, and to see that they are there."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import yaml
from filelock import FileLock, Timeout
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from opefo_trl import __version__
from opefo_trl.files import write_whole
from opefo_trl.hub.card_blocks import addressed, merge
from opefo_trl.hub.outbox import LAST_CHECKPOINT, Outcome, Save, Target, contents, discard, folder_of, note, take, to

CARD = "README.md"
CARDS = ".hub/cards"  # of a run: its own card as it was when it was pushed last, for each address
SILENCE = float(os.environ.get("OPEFO_HUB_TIMEOUT", "120"))  # seconds without a word before a request has failed
AT_ONCE = 500  # files whose state is asked for in one request
RATE_LIMIT = 60.0  # seconds, where the Hub asks to wait and does not say how long
MERGES = 3  # times that somebody else may commit between our look and our commit
PAUSES = (5.0, 15.0, 45.0)  # seconds between attempts, while somebody waits for them to succeed
LONGEST_WAIT = 600.0  # that the Hub may ask for then
FULL, REFUSED, BUSY = (402, 413, 507), (400, 401, 403, 404, 422), 429


class RefusedError(RuntimeError):
    """What trying again does not mend."""


class NotThereError(RuntimeError):
    """The Hub has taken a commit, and not all of its files are there."""


def set_timeouts() -> None:
    """For this process: huggingface_hub by itself waits for an answer for ever."""
    timeout = httpx.Timeout(SILENCE, connect=min(SILENCE, 10.0), pool=None)
    set_client_factory(lambda: httpx.Client(follow_redirects=True, timeout=timeout))


def attempt(run: Path, target: Target) -> Outcome:
    """Push what waits in the outbox of a run. One process at a time: another one's attempt is waited for."""
    try:
        with FileLock(folder_of(run) / "lock", timeout=SILENCE):
            outcomes = [_push_saves(run, target, saves) for saves in take(run, target.every)]
            failed = [outcome for outcome in outcomes if not outcome.ok]
            return (failed or outcomes or [push(target, {}, "")])[-1]
    except Timeout:
        return Outcome([], error="another process is pushing the same run")
    except OSError as error:  # of the outbox: the disk, or a folder that is gone
        return explain(error, target.repo)


def _push_saves(run: Path, target: Target, saves: list[Save]) -> Outcome:
    """To their address, all in one commit."""
    messages = [save.message for save in saves]
    outcome = push(to(target, saves[0]), contents(saves), messages[-1], cards=run / CARDS)
    outcome = replace(outcome, messages=messages)
    note(run, outcome)
    if outcome.ok:
        for save in saves:
            discard(run, save.folder)
    return outcome


def push(
    target: Target,
    files: Mapping[str, Path],
    message: str,
    change: Callable[[str], str] | None = None,
    cards: Path | None = None,
) -> Outcome:
    """
    A commit of `files`, by their paths in the repository, which is made if it is not there. What is there already is
    not sent again, and a card that somebody has written in keeps that. `change` has the last word on the card, and
    is given it as it will be otherwise. `cards` remembers the card among the files, to tell at the next push
    who has written what since.
    """
    repo = target.repo
    try:
        if is_offline_mode():
            raise RefusedError("HF_HUB_OFFLINE is set, so nothing is sent")
        token = get_token()
        if token is None:
            raise RefusedError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
        api = HfApi(token=token, library_name="opefo_trl", library_version=__version__)
        repo = api.create_repo(target.repo, private=target.private, exist_ok=True).repo_id
        if target.revision is not None and not target.revision.startswith("refs/"):
            api.create_branch(repo, branch=target.revision, exist_ok=True)
        if not files and change is None:
            return Outcome([], repo)
        local = None if cards is None else cards / f"{repo}@{target.revision or 'main'}.md".replace("/", "--")
        last = local.read_text() if local is not None and local.is_file() else None
        make_card = partial(_card, api, repo, files.get(CARD), change, last)
        try:
            commit, additions = _commit(api, replace(target, repo=repo), files, message, make_card)
        except (ValueError, yaml.YAMLError) as error:  # a card that cannot be read, or is refused
            _commit(api, replace(target, repo=repo), files, message, lambda there: None)
            raise RefusedError(f"all is there but the card, {CARD}: {error}") from None
        _verify(api, repo, commit.oid, additions)
        if local is not None and CARD in files:
            local.parent.mkdir(parents=True, exist_ok=True)
            write_whole(local, partial(shutil.copyfile, files[CARD]))
        size = sum(addition.upload_info.size for addition in additions)
        return Outcome([message], repo, commit.oid, commit.commit_url, len(additions), size)
    except Exception as error:  # of the network, the server, the disk or the card: the run goes on with any of them
        return explain(error, repo)


def _commit(
    api: HfApi, target: Target, files: Mapping[str, Path], message: str, make_card: Callable[[str | None], str | None]
) -> tuple[CommitInfo, list[CommitOperationAdd]]:
    for remaining in reversed(range(MERGES)):
        info = api.model_info(target.repo, revision=target.revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        additions = [CommitOperationAdd(path, source) for path, source in files.items() if path != CARD]
        card = make_card(info.sha if CARD in there else None)
        if card is not None:
            additions.append(CommitOperationAdd(CARD, card.encode()))
        deletions = [CommitOperationDelete(path) for path in sorted(_stale(there, files))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of parquet files in a model's repository
                commit = api.create_commit(
                    target.repo,
                    [*additions, *deletions],
                    commit_message=message,
                    revision=target.revision,
                    parent_commit=info.sha,
                )
            return commit, additions
        except HfHubHTTPError as error:
            if error.response.status_code != 412 or not remaining:
                raise
    raise AssertionError("unreachable")


def _stale(there: set[str], files: Mapping[str, Path]) -> set[str]:
    """Files of an older `last-checkpoint` that the new one does not have."""
    folder = f"{LAST_CHECKPOINT}/"
    replaced = any(path.startswith(folder) for path in files)
    return {path for path in there if replaced and path.startswith(folder) and path not in files}


def _card(
    api: HfApi,
    repo: str,
    source: Path | None,
    change: Callable[[str], str] | None,
    last: str | None,
    there: str | None,
) -> str | None:
    """The card to commit: ours, with what somebody has written into the one that is `there`, at that commit."""
    text = source.read_text() if source is not None else None
    if there is not None and (text is not None or change is not None):
        with TemporaryDirectory() as folder:  # the cache may be read-only, and is of no use here
            before = Path(api.hf_hub_download(repo, CARD, revision=there, cache_dir=folder)).read_text()
        text = before if text is None else merge(text, before, last)
    if change is not None:
        text = change(text or "")
    return None if text is None else inherit_licence(addressed(text, repo))


def inherit_licence(text: str) -> str:
    """Where the card names none: the base model's."""
    card = ModelCard(text, ignore_metadata_errors=True)
    base = card.data.get("base_model")
    if card.data.get("license") is not None or not isinstance(base, str):
        return text
    with suppress(Exception):  # it is gone, gated or malformed, or the Hub is: a card without a licence is no reason
        of_base = ModelCard.load(base, token=get_token(), ignore_metadata_errors=True).data
        for name in ("license", "license_name", "license_link"):
            card.data[name] = of_base.get(name)
        return str(card)
    return text


def _verify(api: HfApi, repo: str, commit: str, additions: list[CommitOperationAdd]) -> None:
    """Every file, by its hash as the Hub has it."""
    paths = [addition.path_in_repo for addition in additions]
    there = {}
    for begin in range(0, len(paths), AT_ONCE):
        for entry in api.get_paths_info(repo, paths[begin : begin + AT_ONCE], revision=commit):
            if isinstance(entry, RepoFile):
                there[entry.path] = entry
    missing = [addition.path_in_repo for addition in additions if not _is_there(addition, there)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise NotThereError(
            f"the Hub took the commit, and has not {', '.join(missing[:3])}{more} as they were sent (does the "
            "repository's .gitignore leave them out?)"
        )


def _is_there(addition: CommitOperationAdd, there: Mapping[str, RepoFile]) -> bool:
    entry = there.get(addition.path_in_repo)
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        content = file.read()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def explain(error: BaseException, repo: str) -> Outcome:
    """What went wrong, in a line that says what to do, and whether trying again may help."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's, around the real one
        error = error.__cause__
    text, refused, wait = f"{type(error).__name__}: {error}", isinstance(error, ValueError), 0.0
    if isinstance(error, HfHubHTTPError):
        text, refused, wait = _of_status(error, repo)
    elif isinstance(error, httpx.HTTPError):
        text, refused = f"the Hub cannot be reached ({type(error).__name__}: {error})", False
    elif isinstance(error, (RefusedError, NotThereError)):
        text, refused = str(error), isinstance(error, RefusedError)
    return Outcome([], repo, error=without_token(" ".join(text.split())), refused=refused, wait=wait)


def _of_status(error: HfHubHTTPError, repo: str) -> tuple[str, bool, float]:
    status, said = error.response.status_code, error.server_message or ""
    because = f": {said}" if said else ""
    if status == BUSY:
        after = error.response.headers.get("Retry-After", "")
        return f"the Hub asks to wait (429){because}", False, float(after) if after.isdigit() else RATE_LIMIT
    if status in FULL:
        return f"the Hub has no room left for {repo} ({status}){because}", True, 0.0
    if status == 401:
        return (
            f"the Hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN{because}",
            True,
            0.0,
        )
    if status == 403:
        return f"the token may not write to {repo} (403): it needs the role `write`{because}", True, 0.0
    return f"the Hub answered {status}{because or f': {error}'}", status in REFUSED, 0.0


def without_token(text: str) -> str:
    known = [os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with suppress(Exception):
        known.append(get_token())
    for token in filter(None, known):
        text = text.replace(token, "***")
    return text


def check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"`hub_model_id={repo!r}` is no name of a repository: {error}") from None


def patiently(attempt: Callable[[], Outcome]) -> Outcome:
    """Again after a pause, as long as that may help."""
    outcome = attempt()
    for pause in PAUSES:
        if outcome.ok or outcome.refused or outcome.wait > LONGEST_WAIT:
            return outcome
        wait = max(pause, outcome.wait)
        print(f"{outcome.error}. Trying again in {wait:.0f} s ...", file=sys.stderr)
        time.sleep(wait)
        outcome = attempt()
    return outcome
