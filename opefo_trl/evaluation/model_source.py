"""Sources of models: a folder, a LoRA adapter's folder or a name on the Hub, and how the model is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from opefo_trl.files import ADAPTER_FILE
from opefo_trl.playground import resolve_model
from opefo_trl.validation import check_choice

DTYPES = ("auto", "bfloat16", "float16", "float32")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_UNKNOWN_CONTEXT = 1 << 20  # tokens, for a model that names no limit


@dataclass(frozen=True)
class ModelSource:
    """A model to evaluate, and how to load it."""

    name: str  # a folder, a LoRA adapter's folder, a name on the Hub, or "playground"
    revision: str | None = None
    dtype: str = "auto"  # the checkpoint's
    trust_remote_code: bool = False
    max_model_length: int | None = None  # tokens; None is the model's own context
    tensor_parallel_size: int = 1  # this and the next are vLLM's
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def path(self) -> str:
        return resolve_model(self.name)

    @property
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
        """Return a text that changes with the weights: a hash over local files' metadata, or the commit on the Hub."""
        folders = {self.path, self.base}
        files = [file for folder in folders for file in Path(folder).glob("*") if file.suffix in _WEIGHT_SUFFIXES]
        metadata = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if not metadata:
            return getattr(self._config(), "_commit_hash", None) or ""
        return hashlib.blake2b(json.dumps(metadata).encode(), digest_size=8).hexdigest()

    def tokenizer(self) -> Any:
        has_own = (Path(self.path) / "tokenizer_config.json").is_file() or not self.adapter
        tokenizer = AutoTokenizer.from_pretrained(self.path if has_own else self.base, **self.hub_options)
        tokenizer.model_max_length = 1 << 30  # no warning about long texts: `Evaluation` cuts completions itself
        return tokenizer
