"""Recorded rollouts, a model of any size, and single optimizer steps, for benchmarks of everything but generation.

Both trainers get the same generation batches, so that scoring, loss, backward, clipping and update are timed. They
take steps in turns, in the order A B B A; a ratio is that of one such round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from opefo_trl.training.answer_diversity import RolloutAnswers


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add options for the model and its rollouts."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    words = {
        "hidden": "width of the model",
        "layers": "layers of the model",
        "vocab": "vocabulary of the model",
        "rows": "rows of a generation batch",
        "generations": "completions of a prompt",
        "length": "longest completion, in tokens",
        "accumulation": "micro-batches of a step",
        "rounds": "A B B A rounds of each comparison, four steps each",
    }
    for name, help_ in words.items():
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=help_)
    parser.add_argument("--json", type=Path, help="a file for the numbers")


def rollout(
    options: argparse.Namespace, lengths: torch.Tensor, prompts: torch.Tensor, rewards: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Return a generation batch of random tokens in the form that TRL gives it.

    Args:
        lengths, prompts (`Tensor`): tokens of each completion and of its prompt, (rows,).
        rewards (`Tensor`): (groups, completions of a prompt).
    """
    rows, length, width = options.rows, int(lengths.max()), int(prompts.max())
    completion_mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    prompt_mask = (torch.arange(width) >= width - prompts.unsqueeze(1)).long()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch = {
        "prompt_ids": torch.randint(2, options.vocab, (rows, width)) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, options.vocab, (rows, length)) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": advantages.flatten(),
        "num_items_in_batch": completion_mask.sum(),
    }
    return {name: value.to(options.device) for name, value in batch.items()}


def replay(rollouts: list[dict[str, torch.Tensor]]) -> None:
    """
    Replace generation and rewards by recorded rollouts, in both trainers; nothing else is replaced.

    Where generation would give scores, they are those of the model at its first rollout: exact only while it stays as
    it is, but nothing depends on them for its time. A rollout may have the `RolloutAnswers` that its rewards gave as
    `answers`; else a positive advantage counts as right.
    """

    def recorded(self, inputs):
        number = self.state.global_step % len(rollouts)
        batch = dict(rollouts[number])
        if getattr(self, "generation_scores", None) and self.generation_scores.reason is None:
            if not hasattr(self, "recorded_scores"):
                self.recorded_scores = [self.scoring.scores_of(self._score(batch)) for batch in rollouts]
            self.generation_scores.take = lambda *_: self.recorded_scores[number]
        advantages = batch["advantages"]
        share = (advantages > 0).float().view(-1, self.num_generations).mean(1).repeat_interleave(self.num_generations)
        self._answers = batch.pop("answers", None) or RolloutAnswers(advantages, advantages > 0, share, 0.0, 0.0)
        return batch

    GRPOTrainer._generate_and_score_completions = recorded


def build(trainer_class: type, config_class: type, options: argparse.Namespace, bf16: bool = True, **overrides):
    """Return a trainer of a random model that counts its forwards in `model.forwards`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>"))
    args = config_class(
        output_dir="/tmp/opefo-replay",
        use_cpu=options.device == "cpu",
        bf16=bf16 and options.device == "cuda",
        gradient_checkpointing=options.device == "cuda",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,  # a warm-up that builds the optimizer; timed steps go through `step`
        per_device_train_batch_size=options.rows // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        num_generations=options.generations,
        max_completion_length=options.length,
        **{"learning_rate": 1e-6, **overrides},
    )
    with torch.device(options.device):  # half a billion random numbers take a CPU several seconds
        model = Qwen2ForCausalLM(config)
    trainer = trainer_class(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * 4096}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model.forwards = 0

    def count(*_):
        trainer.model.forwards += 1

    trainer.model.base_model.register_forward_hook(count)
    return trainer


def step(trainer, options: argparse.Namespace) -> None:
    """Take one optimizer step as the Trainer does: micro-batches, clipping, update."""
    model = trainer.model_wrapped
    for micro_batch in range(options.accumulation):
        trainer.accelerator.gradient_state._set_sync_gradients(micro_batch == options.accumulation - 1)
        trainer.training_step(model, {}, None)
    trainer._get_grad_norm(model, grad_norm=trainer._clip_grad_norm(model))
    trainer.optimizer.step()
    model.zero_grad()
    trainer.state.global_step += 1


def seconds(work: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def step_seconds(trainer, options: argparse.Namespace) -> float:
    elapsed = seconds(lambda: step(trainer, options))
    trainer._metrics["train"].clear()
    return elapsed


def a_b_b_a(theirs, ours, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the seconds of each side in every round, two steps each."""
    a, b = [], []
    for _ in range(options.rounds):
        a1, b1, b2, a2 = (step_seconds(trainer, options) for trainer in (theirs, ours, ours, theirs))
        a.append(a1 + a2)
        b.append(b1 + b2)
    return a, b


def quartiles(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the quartiles of the ratios of all rounds; the second is their median."""
    return statistics.quantiles([left / right for left, right in zip(over, under, strict=True)], n=4)


def write_results(options: argparse.Namespace, results: object, leave_out: Sequence[str] = ()) -> None:
    """Write the options and the numbers to the file of `--json`, if there is one."""
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", *leave_out)}
        options.json.write_text(
            json.dumps({"device": device_of(options), "options": settings, "results": results}, indent=2)
        )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe(trainer, options: argparse.Namespace) -> str:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{parameters / 1e6:.1f}M parameters, vocabulary {options.vocab}, {options.rows} rows of up to "
        f"{options.length} tokens, {options.accumulation} micro-batches, {device_of(options)}"
    )


def device_of(options: argparse.Namespace) -> str:
    """Return the name of the device, and torch's version."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu
    return f"{device}, torch {torch.__version__}"
