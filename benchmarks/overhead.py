"""What entropy-flow control costs: the training phase of OPEFOTrainer over that of TRL's GRPOTrainer.

    make bench                                     # a 4M-parameter model on one CPU core, 7 minutes
    python benchmarks/overhead.py --device cuda --hidden 1536 --layers 28 --vocab 151936 --length 1024

Both trainers are given the same recorded rollouts, so that what is timed is everything but generation and rewards:
scoring, loss, backward, clipping, update. Each variant takes its steps beside GRPO in the order A B B A, over and
over; a ratio is (B + B) / (A + A) of one such round. Printed are the median of the ratios, their quartiles, and the
ratio of the median step times. On a CPU one thread is used, and `make bench` keeps glibc from handing memory back
between steps: both make the times steadier, for both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

VARIANTS = {
    "control none": {"control": "none"},
    "scope micro": {"flow_scope": "micro"},
    "scope running": {"flow_scope": "running"},
    "scope batch": {"flow_scope": "batch"},
    "batch, expected": {"flow_estimator": "expected"},
    "batch, exact": {"flow_estimator": "exact"},
}


def main() -> None:
    options = parse()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    rollouts = [rollout(options) for _ in range(8)]
    # The one thing that is replaced: generation and rewards, by what was recorded. Both trainers call this.
    GRPOTrainer._generate_and_score_completions = lambda self, inputs: dict(
        rollouts[self.state.global_step % len(rollouts)]
    )
    grpo = build(GRPOTrainer, GRPOConfig, options)
    grpo.train()
    grpo.model.forwards = 0
    parameters = sum(p.numel() for p in grpo.model.parameters())
    tokens = [int(batch["num_items_in_batch"]) for batch in rollouts]
    print(
        f"{parameters / 1e6:.0f}M parameters, vocabulary {options.vocab}, {options.rows} rows of up to "
        f"{options.length} tokens ({statistics.mean(tokens):.0f} trained a step), "
        f"{options.accumulation} micro-batches, {device_name(options.device)}, torch {torch.__version__}"
    )
    print(f"{'':16} {'ratio':>7} {'quartiles':>18} {'ratio of medians':>17} {'forwards/step':>14} {'s/step':>7}")
    results = {}
    for name in options.variants or VARIANTS:
        ours = build(OPEFOTrainer, OPEFOConfig, options, **VARIANTS[name])
        ours.train()
        ours.model.forwards = 0
        ratios, ours_seconds, grpo_seconds = [], [], []
        for _ in range(options.rounds):
            a1, b1, b2, a2 = (step_seconds(trainer, options) for trainer in (grpo, ours, ours, grpo))
            ratios.append((b1 + b2) / (a1 + a2))
            ours_seconds += [b1, b2]
            grpo_seconds += [a1, a2]
        low, median, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "ratio": median,
            "quartiles": [low, high],
            "ratio_of_medians": statistics.median(ours_seconds) / statistics.median(grpo_seconds),
            "forwards": ours.model.forwards / (2 * options.rounds),
            "seconds": statistics.median(ours_seconds),
        }
        row = results[name]
        print(
            f"{name:16} {median:7.3f} {low:9.3f} .. {high:5.3f} {row['ratio_of_medians']:17.3f} "
            f"{row['forwards']:14.2f} {row['seconds']:7.3f}",
            flush=True,
        )
        del ours
    forwards = grpo.model.forwards / (2 * options.rounds * len(results))
    print(f"{'GRPOTrainer':16} {1:7.3f} {'':37} {forwards:14.2f} {statistics.median(grpo_seconds):7.3f}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"options": settings, "results": results}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="rows of a generation batch")
    parser.add_argument("--length", type=int, default=96, help="longest completion, in tokens")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=40, help="A B B A rounds of a variant, four steps each")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="where to write the numbers too")
    return parser.parse_args()


def rollout(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A generation batch as TRL makes it: completions of uneven length, groups of 4, half of them rewarded."""
    rows, length, prompt = options.rows, options.length, 16
    lengths = torch.randint(length // 4, length + 1, (rows, 1))
    lengths[0] = length
    completion_mask = (torch.arange(length) < lengths).long()
    rewards = torch.randint(0, 2, (rows // 4, 4)).float()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch = {
        "prompt_ids": torch.randint(2, options.vocab, (rows, prompt)),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(2, options.vocab, (rows, length)) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": advantages.flatten(),
        "num_items_in_batch": completion_mask.sum(),
    }
    return {name: value.to(options.device) for name, value in batch.items()}


def build(trainer_class, config_class, options, **overrides):
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
        output_dir="/tmp/opefo-overhead",
        use_cpu=options.device == "cpu",
        bf16=options.device == "cuda",
        gradient_checkpointing=options.device == "cuda",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,  # to warm up and to build the optimizer; the timed steps are taken by hand
        per_device_train_batch_size=options.rows // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        num_generations=4,
        max_completion_length=options.length,
        learning_rate=1e-6,
        **overrides,
    )
    trainer = trainer_class(
        Qwen2ForCausalLM(config),
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


def step_seconds(trainer, options) -> float:
    """One optimizer step, as the Trainer takes it: micro-batches, clipping, update."""
    model = trainer.model_wrapped
    synchronize()
    start = time.perf_counter()
    for micro_batch in range(options.accumulation):
        trainer.accelerator.gradient_state._set_sync_gradients(micro_batch == options.accumulation - 1)
        trainer.training_step(model, {}, None)
    trainer._get_grad_norm(model, grad_norm=trainer._clip_grad_norm(model))
    trainer.optimizer.step()
    model.zero_grad()
    synchronize()
    elapsed = time.perf_counter() - start
    trainer.state.global_step += 1
    trainer._metrics["train"].clear()
    return elapsed


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
