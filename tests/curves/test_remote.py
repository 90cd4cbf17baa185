import httpx
import pytest
from huggingface_hub import errors

from opefo_trl.curves.remote import fetch

RESPONSE = httpx.Response(503, request=httpx.Request("GET", "http://localhost"))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (errors.LocalEntryNotFoundError("x"), ["'user/model'", "curves.parquet", "HF_HUB_OFFLINE"]),
        (errors.EntryNotFoundError("x"), ["'user/model' at 'v1'", "curves.parquet", "`entropy_curves=False`"]),
        (errors.RevisionNotFoundError("x", response=RESPONSE), ["'user/model'", "'v1'"]),
        (errors.GatedRepoError("x", response=RESPONSE), ["'user/model'", "`hf auth login`"]),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), ["'user/model'", "private", "`token=`"]),
        (errors.HfHubHTTPError("x", response=RESPONSE), ["'user/model'", "curves.parquet", "503"]),
    ],
)
def test_every_failure_is_one_line_that_names_the_file(error, parts, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(FileNotFoundError) as failed:
        fetch("user/model", "curves.parquet", "v1")
    assert all(part in str(failed.value) for part in parts) and "\n" not in str(failed.value)
