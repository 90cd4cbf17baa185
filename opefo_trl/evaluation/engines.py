"""Engines that sample completions: vLLM and transformers; `auto` is vLLM if it is installed, else transformers.

Each engine has `sample(prompts, seeds, limits)`: token ids in, one `Sample` out for each, in order. A seed belongs to
one completion. vLLM gives it to the request, so a completion does not depend on its neighbours in the batch;
transformers has one random state for a batch, seeded with the batch's first seed.

Log-probabilities are those of the distribution that is sampled from, after temperature and top-p; at temperature 0,
of the unscaled distribution. Minus their mean estimates that distribution's entropy per token.
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
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.validation import check_choice

ENGINES = ("auto", "vllm", "transformers")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM takes for `max_lora_rank`


class Sample(NamedTuple):
    """A completion. `tokens` counts the end token; `logp` is the log-probability of all tokens together."""

    text: str
    tokens: int
    truncated: bool
    logp: float


@dataclass(frozen=True)
class Decoding:
    """Settings of sampling. Temperature 0 is greedy."""

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


class Engine(Protocol):
    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[Sample]: ...


def seed_of(seed: int, *names: Any) -> int:
    """Return a seed for one completion, derived from the run's seed and names: the same in every run."""
    text = json.dumps([seed, *names]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def resolve_engine(kind: str) -> tuple[str, str]:
    """Resolve 'auto' to 'vllm' or 'transformers'; return that name and a label with the package version."""
    check_choice("engine", kind, ENGINES)
    has_vllm = find_spec("vllm") is not None
    if kind == "vllm" and not has_vllm:
        raise ImportError("`engine='vllm'` needs vLLM: pip install 'trl[vllm]'. Or leave the option out.")
    kind = "vllm" if kind == "vllm" or (kind == "auto" and has_vllm) else "transformers"
    return kind, f"{kind} {_version(kind, f'{kind}-cpu')}"


def make_engine(kind: str, source: ModelSource, decoding: Decoding, tokenizer: Any, length: int) -> Engine:
    """Load the model. `length` is the maximum of prompt + completion tokens (vLLM's `max_model_len`)."""
    return VLLM(source, decoding, length) if kind == "vllm" else Transformers(source, decoding, tokenizer)


class VLLM:
    """vLLM in this process. Under accelerate each process has an engine on GPUs of its own."""

    def __init__(self, source: ModelSource, decoding: Decoding, length: int):
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a forked process cannot use CUDA
        _detach_from_ranks(source.tensor_parallel_size)
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = source.adapter
        rank = adapter.get("r", 0) if adapter else 0
        max_rank = next(size for size in _LORA_RANKS if size >= rank)
        self.decoding, self.params = decoding, SamplingParams
        self.lora = LoRARequest("adapter", 1, source.path) if adapter else None
        self.llm = LLM(
            source.base,
            **source.hub_options,
            dtype=source.dtype,
            max_model_len=length,
            tensor_parallel_size=source.tensor_parallel_size,
            gpu_memory_utilization=source.gpu_memory_utilization,
            logprobs_mode="processed_logprobs",
            **({"enable_lora": True, "max_lora_rank": max_rank} if adapter else {}),
            **_no_chunked_prefill_on_cpu(length),
        )
        self._watchdog = _end_children_with_this_process()

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[Sample]:
        params = [
            self.params(
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
                max_tokens=limit,
                seed=seed,
                logprobs=0,  # only of the sampled token
            )
            for seed, limit in zip(seeds, limits, strict=True)
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False, lora_request=self.lora)
        completions = [output.outputs[0] for output in outputs]
        return [
            Sample(one.text, len(one.token_ids), one.finish_reason == "length", float(one.cumulative_logprob or 0.0))
            for one in completions
        ]


def _no_chunked_prefill_on_cpu(context: int) -> dict[str, Any]:
    """Disable chunked prefill on vLLM's CPU build (0.31), which cannot replay a seeded request's random numbers when a
    prompt is split; {} elsewhere."""
    from vllm.platforms import current_platform

    return {"enable_chunked_prefill": False, "max_num_batched_tokens": context} if current_platform.is_cpu() else {}


def _end_children_with_this_process() -> subprocess.Popen | None:
    """
    Start a watchdog shell that, 5 s after this process exits or is killed, kills its child processes (vLLM's engine
    among them, which would keep the GPU). It detects the exit by EOF on stdin.
    """
    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    if not children:
        return None
    script = f"cat > /dev/null; sleep 5; kill -9 {' '.join(children)}"
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )


def _detach_from_ranks(gpus: int) -> None:
    """Restrict this process to its own `gpus` GPUs, and hide accelerate's ranks, which vLLM would take for its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own = visible.split(",")[rank * gpus : (rank + 1) * gpus]
        if len(own) < gpus:
            raise ValueError(
                f"`tensor_parallel_size={gpus}` leaves too few of the {len(visible.split(','))} GPUs for process "
                f"{rank} of this machine. Start fewer processes."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    for name in [*os.environ]:
        if name in _RANK_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


class Transformers:
    """`generate` of transformers; all prompts of a call form one batch."""

    def __init__(self, source: ModelSource, decoding: Decoding, tokenizer: Any):
        self.decoding, self.tokenizer = decoding, tokenizer
        model = AutoModelForCausalLM.from_pretrained(source.base, dtype=source.dtype, **source.hub_options)
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
        # Ignores the model's own generation settings, such as a repetition penalty: `_Recorder` applies temperature
        # and top-p.
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
        recorder = _Recorder(self.decoding)
        row_limits = _RowLimits(width, torch.tensor(limits, device=self.device))
        self.model.generation_config.max_new_tokens = max(limits)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=[recorder], stopping_criteria=[row_limits]
        )
        new = output[:, width:]  # (B, T)
        logps = recorder.logps(output)  # (B, T)
        ended = torch.isin(new, self.ends)
        first_end = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])  # (B,)
        lengths = first_end.minimum(row_limits.limits)
        completions = [row[:length].tolist() for row, length in zip(new, lengths, strict=True)]
        return [
            Sample(
                self.tokenizer.decode(tokens, skip_special_tokens=True),
                len(tokens),
                tokens[-1] not in self.ends,
                float(row_logps[: len(tokens)].sum()),
            )
            for tokens, row_logps in zip(completions, logps, strict=True)
        ]


class _Recorder(LogitsProcessor):
    """Applies temperature and top-p, and records each token's log-probability one step later, once it is sampled."""

    def __init__(self, decoding: Decoding):
        self.recorded: list[Tensor] = []  # (B, 1) for each step
        self.last: Tensor | None = None  # (B, V)
        self.warpers: list[Any] = []
        if decoding.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_p < 1:
                self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        self.last = scores.log_softmax(-1)
        return scores

    def _record(self, input_ids: Tensor) -> None:
        if self.last is not None:
            self.recorded.append(self.last.gather(1, input_ids[:, -1:]))

    def logps(self, output: Tensor) -> Tensor:
        """Return the log-probabilities of the new tokens of `output`, (B, T)."""
        self._record(output)
        return torch.cat(self.recorded, 1)


class _RowLimits(StoppingCriteria):
    """Stops each row at its own number of new tokens; `limits` is (B,)."""

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
