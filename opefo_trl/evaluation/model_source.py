"""Sources of models: a folder, a LoRA adapter's folder or a name on the Hub, and how the model is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from opefo_trl.files import ADAPTER_FILE, TRAINING_STATE_FILES
from opefo_trl.playground import resolve_model
from opefo_trl.repositories import is_repository
from opefo_trl.validation import check_choice

DTYPES = ("auto", "bfloat16", "float16", "float32")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_NO_WEIGHTS = ("training_args.bin", *TRAINING_STATE_FILES)
_UNKNOWN_CONTEXT = 1 << 20  # tokens, for a model that names no limit
_SLICE, _SLICES = 1 << 14, 256  # bytes of one, and how many make the hash of a file


@dataclass(frozen=True)
class ModelSource:
    """A model to evaluate, and how to load it."""

    name: str  # a folder or a name on the Hub, of a model or a LoRA adapter; or "playground"
    revision: str | None = None
    dtype: str = "auto"  # the checkpoint's
    trust_remote_code: bool = False
    max_model_length: int | None = None  # tokens; None is the model's own context
    tensor_parallel_size: int = 1  # this and the next are vLLM's
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)

    @cached_property
    def path(self) -> str:
        """Folder or name on the Hub. A LoRA adapter on the Hub is downloaded: vLLM takes a folder."""
        path = resolve_model(self.name)
        if is_repository(path) and find_adapter_config_file(path, revision=self.revision):
            return snapshot_download(path, revision=self.revision, ignore_patterns=["*/*"])  # no checkpoints
        return path

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """Settings of the LoRA adapter if the folder holds one instead of a model."""
        file = Path(self.path) / ADAPTER_FILE
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def base(self) -> str:
        """Path or name of the model itself, or of the adapter's base model."""
        return resolve_model(self.adapter["base_model_name_or_path"]) if self.adapter else self.path

    @property
    def hub_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the base model. An adapter's revision is not its base model's."""
        revision = None if self.adapter else self.revision
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}

    def _config(self) -> Any:
        return AutoConfig.from_pretrained(self.base, **self.hub_options)

    def context(self) -> int:
        """Return the number of tokens that a prompt and its completion may have together."""
        if self.max_model_length is not None:
            return self.max_model_length
        return int(getattr(self._config().get_text_config(), "max_position_embeddings", 0) or _UNKNOWN_CONTEXT)

    def fingerprint(self) -> str:
        """Return a text that changes with the weights: that of local files, and a hash over those on the Hub."""
        return self.local_fingerprint() + ("" if Path(self.base).is_dir() else "-" + _digest(self._blobs()))

    def local_fingerprint(self) -> str:
        """Return a hash over the content of local weights. The same weights, saved or copied again, have the same."""
        folders = [Path(folder) for folder in {self.path, self.base} if Path(folder).is_dir()]
        files = [file for folder in folders for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES]
        weights = [(file, file.stat()) for file in files if not any(fnmatch(file.name, name) for name in _NO_WEIGHTS)]
        return _digest(sorted((file.name, _sampled(file, stat.st_size, stat.st_mtime_ns)) for file, stat in weights))

    def _blobs(self) -> list[tuple[str, str]]:
        """Return the names and hashes of the base model's weight files on the Hub; of its cache if it is out of
        reach. (The commit would change with every push of results, too.)"""
        revision = self.hub_options["revision"]
        try:
            files = HfApi().model_info(self.base, revision=revision, files_metadata=True).siblings or []
            blobs = [(file.rfilename, file.lfs.sha256 if file.lfs else str(file.blob_id)) for file in files]
        except (OSError, HTTPError):
            snapshot = Path(snapshot_download(self.base, revision=revision, local_files_only=True))
            blobs = [(file.name, file.resolve().name) for file in snapshot.iterdir()]
        return sorted(blob for blob in blobs if "/" not in blob[0] and Path(blob[0]).suffix in _WEIGHT_SUFFIXES)

    def tokenizer(self) -> Any:
        has_own = (Path(self.path) / "tokenizer_config.json").is_file() or not self.adapter
        tokenizer = AutoTokenizer.from_pretrained(self.path if has_own else self.base, **self.hub_options)
        tokenizer.model_max_length = 1 << 30  # no warning about long texts: `Evaluation` cuts completions itself
        return tokenizer


def is_of(results: dict[str, Any], folder: Path) -> bool:
    """Return whether results of eval.py are of the weights that are in a folder now."""
    return str(results["settings"].get("weights")).startswith(ModelSource(str(folder)).local_fingerprint())


@cache
def _sampled(file: Path, size: int, modified: int) -> str:
    """Return a hash over a file's size and slices from all over it: a file of weights takes long to read, and training
    changes all of it."""
    content = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for place in range(0, size, max(_SLICE, size // _SLICES)):
            stream.seek(place)
            content.update(stream.read(_SLICE))
        stream.seek(max(0, size - _SLICE))
        content.update(stream.read())
    return content.hexdigest()


def _digest(metadata: list[tuple[str, str]]) -> str:
    return hashlib.blake2b(json.dumps(metadata).encode(), digest_size=8).hexdigest()
