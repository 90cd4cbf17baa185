"""Peak memory of a training step as `python -m opefo_trl.plan` predicts it, beside the measured one.

    python benchmarks/memory.py --json benchmarks/results/plan.json       # one CPU core, ten minutes
    python benchmarks/memory.py --cases tiny                              # those whose names begin so

Each case trains a model with random weights for one step and measures the next one, in a process of its own, on
recorded completions that all reach the limit; prompts have eight lengths, so that there is padding and so a mask.
`rest` is what parameters and optimizer hold between two steps, counted from the tensors; `beyond` the most that torch
allocated during the step beyond what it began with (gradients, activations, logits, scratch memory), from torch's
profiler. The peak is their sum. Errors are those of the prediction. No reward runs and nothing is generated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.update(KINETO_LOG_LEVEL="5", TORCH_CPP_LOG_LEVEL="ERROR")  # silence the profiler
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from replay import device_of, replay, rollout
from tokenizers import Tokenizer, models
from training_phase import peak_mib
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.plan.memory import GIB, predict
from opefo_trl.plan.recipe import Machine, read_recipe
from opefo_trl.plan.shapes import SHIPPED, Shape, load_shape, read_shape

TINY = {
    "model_type": "qwen2", "vocab_size": 1024, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {**TINY, "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY_RUN = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": 240}
SMOLLM2_RUN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 112}
PROMPT = 16
LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": ["all-linear"]}
CHECKPOINTING = {"gradient_checkpointing": True}
VARIANTS = {
    "": {}, ", checkpointing": CHECKPOINTING, ", LoRA": LORA, ", LoRA, checkpointing": LORA | CHECKPOINTING,
}  # fmt: skip
CASES = {
    **{f"tiny{words}": (TINY, TINY_RUN | settings) for words, settings in VARIANTS.items()},
    "tiny, bf16 autocast": (TINY, TINY_RUN | {"bf16": True}),
    "tiny, bf16 autocast, checkpointing": (TINY, TINY_RUN | {"bf16": True} | CHECKPOINTING),
    "tiny, bf16 weights": (TINY, TINY_RUN | {"bf16": True, "dtype": "bfloat16"}),
    "tiny, one micro-batch": (TINY, TINY_RUN | {"gradient_accumulation_steps": 1}),
    "tiny, eager attention": (TINY, TINY_RUN | {"attn_implementation": "eager"}),
    "tiny, rows one by one": (TINY, TINY_RUN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    "tiny, Qwen3, tied": (QWEN3, TINY_RUN),
    **{f"135M{words}": (SMOLLM2, SMOLLM2_RUN | settings) for words, settings in VARIANTS.items()},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=[""], metavar="NAME", help="how the names of the cases begin")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(compare(options.one)))
        return
    rows = []
    print(f"{'GiB':36} {'peak':>17} {'error':>7} {'beyond rest':>17} {'error':>7}")
    for name in (name for name in CASES if name.startswith(tuple(options.cases))):
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if options.json:
        device = device_of(argparse.Namespace(device="cpu"))
        options.json.write_text(json.dumps({"device": device, "results": rows}, indent=2) + "\n")


def line(row: dict) -> str:
    predicted, measured = row["predicted"], row["measured"]
    cells = [
        f"{predicted[key]:8.3f} {measured[key]:8.3f} {100 * error(row, key):+6.1f}%" for key in ("peak", "beyond")
    ]
    return f"{row['case']:36} {' '.join(cells)}"


def error(row: dict, key: str) -> float:
    return row["predicted"][key] / row["measured"][key] - 1


def compare(name: str) -> dict:
    return {"case": name, "predicted": prediction(name), "measured": measure(name)}


def prediction(name: str) -> dict[str, float]:
    """Return the predicted GiB of a case."""
    shape, settings = shape_and_settings(name)
    training = predict(shape, read_recipe(settings, PROMPT), Machine(1, 64, "none", on_gpu=False)).training
    peak, rest = sum(training.values()), training["weights"] + training["optimizer"]
    return {"peak": peak / GIB, "beyond": (peak - rest) / GIB}


def shape_and_settings(name: str) -> tuple[Shape, dict]:
    model, settings = CASES[name]
    shape = load_shape(model) if isinstance(model, str) else read_shape(model)
    return shape, {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, **settings}


def measure(name: str) -> dict[str, float]:
    """Train for a step, and measure the memory of another, in GiB."""
    model, (shape, settings) = CASES[name][0], shape_and_settings(name)
    trainer = build(SHIPPED[model] if isinstance(model, str) else model, settings)
    options = argparse.Namespace(
        device="cpu", rows=trainer.args.generation_batch_size, vocab=shape.vocabulary,
        accumulation=trainer.args.gradient_accumulation_steps,
    )  # fmt: skip
    groups = options.rows // 4
    lengths = torch.full((options.rows,), trainer.args.max_completion_length)
    prompts = PROMPT - torch.arange(options.rows) % 8
    replay([rollout(options, lengths, prompts, torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(groups, 1))])
    trainer.train()
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    rest = sum(tensor.nbytes for tensor in {*trainer.model.parameters(), *state}) / GIB
    beyond = peak_mib(trainer, options) / 1024
    return {"peak": rest + beyond, "beyond": beyond}


def build(model: dict, settings: dict) -> OPEFOTrainer:
    config = AutoConfig.for_model(**model, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    settings = dict(settings)
    dtype, attention = settings.pop("dtype", "float32"), settings.pop("attn_implementation", "sdpa")
    targets, rank = settings.pop("lora_target_modules", None), settings.pop("lora_r", None)
    adapter = LoraConfig(r=rank, target_modules=targets[0]) if settings.pop("use_peft", False) else None
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>"))
    trainer = OPEFOTrainer(
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention),
        lambda completions, **_: [0.0] * len(completions),
        OPEFOConfig(
            output_dir=tempfile.mkdtemp(), num_generations=4, max_steps=1, learning_rate=1e-6, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_steps=1, entropy_curves=False, **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * 64}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"),
        peft_config=adapter,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
