"""Download one file of a run from the Hub, or take it from the cache."""

from __future__ import annotations

from pathlib import Path


def fetch(repo: str, file: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the path of the downloaded file. Every failure becomes a `FileNotFoundError` of one line."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download() -> Path:
        return Path(hf_hub_download(repo, file, revision=revision, token=token))

    at = f"{repo!r}" + (f" at {revision!r}" if revision else "")
    try:
        try:
            return download()
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            return download()  # a connection that was kept had broken; now it is a new one, or the cache
    except LocalEntryNotFoundError as error:
        reason = (
            f"There is no folder {repo!r}; {file} of {at} on the Hub is not in the cache, and the Hub cannot be "
            f"reached, or HF_HUB_OFFLINE is set ({type(error.__cause__).__name__})."
        )
    except EntryNotFoundError:
        reason = f"{at} on the Hub has no {file}: it was not trained with opefo_trl, or with `entropy_curves=False`."
    except RevisionNotFoundError:
        reason = f"{repo!r} on the Hub has no revision {revision!r}."
    except GatedRepoError:
        reason = f"{at} on the Hub is gated: ask for access on its page, and log in with `hf auth login`."
    except RepositoryNotFoundError:
        reason = (
            f"There is neither a folder {repo!r} nor such a repository on the Hub, or it is private and the token may "
            "not read it (`hf auth login`, or `token=`)."
        )
    except HfHubHTTPError as error:
        reason = f"{file} of {at} could not be fetched: the Hub answered {error.response.status_code}."
    except HTTPError as error:
        reason = f"{file} of {at} could not be fetched: {type(error).__name__}: {error}"
    raise FileNotFoundError(reason)
