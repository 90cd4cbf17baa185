"""Completions for prompts, by vLLM where it is installed and by transformers otherwise.

Each engine has `sample(prompts, seeds, limits)`: token ids in, one `Sample` out for each, in their order. A seed
belongs to one completion. vLLM gives it to the request, so that a completion does not depend on its neighbours;
transformers has one random state for a batch, and takes it from the batch's first seed.

Log-probabilities are those of the distribution that is sampled from, after temperature and top-p. So minus their mean
is an estimate of that distribution's entropy per token.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from opefo_trl.playground import resolve_model
from opefo_trl.validation import check_choice

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENGINES = ("auto", "vllm", "transformers")
ADAPTER = "adapter_config.json"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


class Sample(NamedTuple):
    text: str
    tokens: int  # its end included
    truncated: bool
    logp: float  # of all its tokens together


@dataclass(frozen=True)
class Decoding:
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 16_384

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature={self.temperature}` must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p={self.top_p}` must be in (0, 1].")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens={self.max_new_tokens}` must be 1 or more.")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and how it is held."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_model_length: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def path(self) -> str:
        return resolve_model(self.name)

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The settings of a LoRA adapter, where the folder holds one in place of a model."""
        file = Path(self.path) / ADAPTER
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def base(self) -> str:
        return resolve_model(self.adapter["base_model_name_or_path"]) if self.adapter else self.path

    @property
    def hub(self) -> dict[str, Any]:
        """What loading the base model takes."""
        revision = None if self.adapter else self.revision
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}

    def context(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        if self.max_model_length is not None:
            return self.max_model_length
        config = AutoConfig.from_pretrained(self.base, **self.hub)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return int(getattr(text, "max_position_embeddings", 0) or 1 << 20)

    def weights(self) -> str:
        """Tells one state of a model from another: names, sizes and times of local files, or the commit on the Hub."""
        files = [
            file for folder in {self.path, self.base} for file in Path(folder).glob("*") if file.suffix in WEIGHTS
        ]
        facts = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if not facts:
            return getattr(AutoConfig.from_pretrained(self.base, **self.hub), "_commit_hash", None) or ""
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def tokenizer(self) -> Any:
        own = (Path(self.path) / "tokenizer_config.json").is_file() or not self.adapter
        tokenizer = AutoTokenizer.from_pretrained(self.path if own else self.base, **self.hub)
        tokenizer.model_max_length = 1 << 30  # what is too long for the context is ours to say
        return tokenizer


def seed_of(seed: int, *names: Any) -> int:
    """A seed of its own for every completion, the same in every run."""
    text = json.dumps([seed, *names]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


class Engine(Protocol):
    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[Sample]: ...


def engine_of(kind: str) -> tuple[str, str]:
    """The engine that will be used, and with its version."""
    check_choice("engine", kind, ENGINES)
    there = find_spec("vllm") is not None
    if kind == "vllm" and not there:
        raise ImportError(
            "`engine='vllm'`, and there is no vLLM here: pip install 'opefo_trl[vllm]', or leave it out."
        )
    kind = "vllm" if kind == "vllm" or (kind == "auto" and there) else "transformers"
    return kind, f"{kind} {_version(kind, f'{kind}-cpu')}"


def make_engine(kind: str, source: ModelSource, decoding: Decoding, tokenizer: Any, length: int) -> Engine:
    """`length` is that of the longest prompt and completion together: vLLM sets memory aside for it."""
    return VLLM(source, decoding, length) if kind == "vllm" else Transformers(source, decoding, tokenizer)


class VLLM:
    """vLLM in this process; under accelerate each process has an engine on GPUs of its own."""

    def __init__(self, source: ModelSource, decoding: Decoding, length: int):
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork cannot use CUDA
        _one_of_many(source.tensor_parallel_size)
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = source.adapter
        rank = adapter.get("r", 0) if adapter else 0
        lora = {"enable_lora": True, "max_lora_rank": next(size for size in RANKS if size >= rank)} if adapter else {}
        self.decoding, self.params = decoding, SamplingParams
        self.lora = LoRARequest("adapter", 1, source.path) if adapter else None
        self.llm = LLM(
            source.base,
            **source.hub,
            dtype=source.dtype,
            max_model_len=length,
            tensor_parallel_size=source.tensor_parallel_size,
            gpu_memory_utilization=source.gpu_memory_utilization,
            logprobs_mode="processed_logprobs",
            **lora,
            **_whole_prompts(length),
        )
        self._guard = _end_with_this_process()

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[Sample]:
        params = [
            self.params(
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
                max_tokens=limit,
                seed=seed,
                logprobs=0,  # of the token that was taken
            )
            for seed, limit in zip(seeds, limits, strict=True)
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False, lora_request=self.lora)
        return [
            Sample(one.text, len(one.token_ids), one.finish_reason == "length", float(one.cumulative_logprob or 0.0))
            for one in (output.outputs[0] for output in outputs)
        ]


def _whole_prompts(context: int) -> dict[str, Any]:
    """vLLM's CPU build (0.31) cannot take a prompt in parts if the request has a seed: it rewinds CUDA's only."""
    from vllm.platforms import current_platform

    return {"enable_chunked_prefill": False, "max_num_batched_tokens": context} if current_platform.is_cpu() else {}


def _end_with_this_process() -> subprocess.Popen | None:
    """
    vLLM's engine is a process of its own that outlives one that is killed, and keeps the GPU. A shell waits at a pipe
    for this process to end, however it does, and ends the engine then.
    """
    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    if not children:
        return None
    script = f"cat > /dev/null; sleep 5; kill -9 {' '.join(children)}"  # time enough to end by itself
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )


def _one_of_many(gpus: int) -> None:
    """Leave this process the GPUs that are its own, and let vLLM not take accelerate's ranks for its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own = visible.split(",")[rank * gpus : (rank + 1) * gpus]
        if len(own) < gpus:
            raise ValueError(
                f"`tensor_parallel_size={gpus}`, and {len(visible.split(','))} GPUs are too few for process {rank} of "
                "this machine. Start fewer processes."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    for name in [*os.environ]:
        if name in RANK_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


class Transformers:
    def __init__(self, source: ModelSource, decoding: Decoding, tokenizer: Any):
        self.decoding, self.tokenizer = decoding, tokenizer
        model = AutoModelForCausalLM.from_pretrained(source.base, dtype=source.dtype, **source.hub)
        if source.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, source.path).merge_and_unload()
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.model = model.to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = torch.tensor(
            [end for end in {*ends, tokenizer.eos_token_id} if end is not None], device=self.device
        )
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0])
        # Of the model's own settings (a repetition penalty, say) nothing: `Record` applies temperature and top-p
        self.model.generation_config = GenerationConfig(
            do_sample=decoding.temperature > 0, top_k=0, eos_token_id=self.ends.tolist(), pad_token_id=self.pad
        )

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[Sample]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device
        )
        torch.manual_seed(seeds[0])
        record = Record(self.decoding)
        done = AtItsLimit(width, torch.tensor(limits, device=self.device))
        self.model.generation_config.max_new_tokens = max(limits)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=[record], stopping_criteria=[done]
        )
        new = output[:, width:]
        logps = record.of(output)  # (B, T)
        ended = torch.isin(new, self.ends)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
        lengths = first.minimum(done.limits)
        texts = [row[:length].tolist() for row, length in zip(new, lengths, strict=True)]
        return [
            Sample(
                self.tokenizer.decode(text, skip_special_tokens=True),
                len(text),
                text[-1] not in self.ends,
                float(row[: len(text)].sum()),
            )
            for text, row in zip(texts, logps, strict=True)
        ]


class Record(LogitsProcessor):
    """Applies temperature and top-p, and keeps the log-probability of each token that is taken, one step later."""

    def __init__(self, decoding: Decoding):
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None
        self.warpers: list[Any] = []
        if decoding.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_p < 1:
                self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        self.last = scores.log_softmax(-1)
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self.last is not None:
            self.kept.append(self.last.gather(1, input_ids[:, -1:]))

    def of(self, output: Tensor) -> Tensor:
        """Log-probabilities of the new tokens, (B, T)."""
        self._take(output)
        return torch.cat(self.kept, 1)


class AtItsLimit(StoppingCriteria):
    """Rows stop where their own context ends."""

    def __init__(self, width: int, limits: Tensor):
        self.width, self.limits = width, limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.width >= self.limits


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"
