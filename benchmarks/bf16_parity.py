"""Lambda and gradient in bf16, beside fp32: the same model on the same completions.

    python benchmarks/bf16_parity.py --model out/smollm2 --task words --device cuda --json out/parity.json

Rollouts are sampled once, in fp32, and replayed with a learning rate of 0: in fp32, with bf16 autocast over fp32
weights (`bf16: true`), and with bf16 weights (`dtype: bfloat16`). The gradient is compared with fp32's under the same
control: the norm of the difference over fp32's norm, and the cosine. What `none` shows there is rounding of the model
itself; `opefo` should add little to it. Lambda is the paper's, unbounded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from replay import device_of, replay, write_results
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import TASKS
from opefo_trl.rewards import find_reward

PRECISIONS = {
    "fp32": ("float32", False),
    "bf16 autocast": ("float32", True),
    "bf16 weights": ("bfloat16", True),
}
CONTROLS = {"none": {"control": "none"}, "opefo": {"control": "opefo", "flow_lambda_max": 1.0}}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    print(f"{options.model}, {options.task}, {device_of(options)}")
    rollouts = sampled(options)
    replay(rollouts)
    results: dict[str, Any] = {}
    print(f"{'':24} {'entropy':>9} {'lambda':>9} {'apart':>9} {'gradient':>9} {'cosine':>9}")
    for control in CONTROLS:
        reference: Measured | None = None
        for precision in PRECISIONS:
            measured = Measured.run(precision, control, options)
            reference = reference or measured
            row = measured.row(reference)
            results[f"{control}, {precision}"] = row
            write_results(options, results)
            print(
                f"{control + ', ' + precision:24} {mean(row['entropy']):9.4f} {mean(row['lambda']):9.4f} "
                f"{row['lambda_apart']:9.1e} {max(row['gradient_apart']):9.1e} {min(row['cosine']):9.6f}",
                flush=True,
            )


def cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(ours @ theirs / (ours.norm() * theirs.norm()))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def make_trainer(options: argparse.Namespace, precision: str, **overrides: Any) -> OPEFOTrainer:
    dtype, bf16 = PRECISIONS[precision]
    rows = options.prompts * options.generations
    task = TASKS[options.task]
    args = OPEFOConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "opefo-parity"),
        use_cpu=options.device == "cpu",
        bf16=bf16,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_steps=options.rollouts,
        per_device_train_batch_size=min(options.rows, rows),
        gradient_accumulation_steps=rows // min(options.rows, rows),
        num_generations=options.generations,
        max_completion_length=task.max_new_tokens,
        temperature=0.7,
        entropy_curves=False,
        model_init_kwargs={"dtype": dtype},
        **overrides,
    )
    reward = find_reward(options.task, task.max_new_tokens)
    trainer = OPEFOTrainer(options.model, reward, args, train_dataset=task.dataset())
    trainer.remove_callback(PrinterCallback)
    return trainer


def sampled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rollouts of the task, in the form that TRL gives them."""
    rollouts: list[dict[str, Any]] = []
    original = GRPOTrainer._generate_and_score_completions

    def recorded(self: Any, inputs: Any) -> Any:
        batch = original(self, inputs)
        rollouts.append({**batch, "answers": self._answers})
        return batch

    GRPOTrainer._generate_and_score_completions = recorded
    try:
        make_trainer(options, "fp32", control="none", flow_scope="running").train()
    finally:
        GRPOTrainer._generate_and_score_completions = original
    return rollouts


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step in fp32."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.steps.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))


class Measured:
    """Entropy, lambda and gradient of each rollout, in one precision and under one control."""

    def __init__(self, history: list[dict[str, float]], gradients: list[torch.Tensor]):
        self.entropy = [row["entropy"] for row in history if "entropy" in row]
        self.lambdas = [row.get("flow/lambda", 0.0) for row in history if "entropy" in row]
        self.gradients = gradients

    @classmethod
    def run(cls, precision: str, control: str, options: argparse.Namespace) -> Measured:
        trainer = make_trainer(options, precision, micro_batching="trl", **CONTROLS[control])
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        return cls(trainer.state.log_history, gradients.steps)

    def row(self, reference: Measured) -> dict[str, Any]:
        pairs = list(zip(self.gradients, reference.gradients, strict=True))
        return {
            "entropy": self.entropy,
            "lambda": self.lambdas,
            "lambda_apart": max(abs(a - b) for a, b in zip(self.lambdas, reference.lambdas, strict=True)),
            "gradient_apart": [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs],
            "cosine": [cosine(ours.double(), theirs.double()) for ours, theirs in pairs],
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="playground", help="a folder, or the playground's model")
    parser.add_argument("--task", default="playground", choices=list(TASKS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a rollout")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
