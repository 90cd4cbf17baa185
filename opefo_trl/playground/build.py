"""Build the playground's model from scratch: opefo-trl playground build [--output DIR] [--steps N]

A character tokenizer, a Qwen2 of 0.4 million parameters, and supervised training on random expressions. Most of them
are right, so that the model learns to calculate; towards the end many miss their target by a little, so that it is
careless. The result resembles a base model: it writes well-formed answers of every kind, few of them are right, and
reinforcement has something to find. All randomness comes from one seed: on one machine the files are the same byte for
byte.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    get_cosine_schedule_with_warmup,
)

from opefo_trl.playground import MODEL
from opefo_trl.playground.task import MAX_ANSWER, TARGETS, question, random_expression

_SPECIAL = ("<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
_MERGES = [("M", "a"), ("Ma", "k"), ("Mak", "e")]  # the one word of the task
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

The playground's model: Qwen2's architecture at 0.4 million parameters, which writes expressions equal to a number.
`opefo-trl playground build` makes it.
"""
_STEPS = 3000
_BATCH = 256
_CARELESS = 0.1  # last share of the training, in which some answers miss their target
_WRONG = 0.6  # share of those answers


def _make_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen2's tokenizer with three merges: every character of an answer is a token, and any text has tokens."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_MERGES,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        unk_token=None,
        extra_special_tokens=list(_SPECIAL[2:]),
        padding_side="left",
        model_max_length=256,
        chat_template=_CHAT_TEMPLATE,
    )


def _make_model(vocabulary: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,  # of 32 dimensions each, the smallest size that vLLM supports
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _batch(tokenizer: Qwen2Tokenizer, generator: random.Random, wrong: float) -> dict[str, torch.Tensor]:
    """Return questions and answers as token ids, (B, T), with labels on the answers only."""
    rows, starts = [], []
    for _ in range(_BATCH):
        answer, target = random_expression(generator)
        if generator.random() < wrong:
            target += generator.choice((-3, -2, -1, 1, 2, 3))
            target = min(max(target, TARGETS[0]), TARGETS[-1])
        start = tokenizer.encode(f"<|user|>{question(target)}<|assistant|>")
        rows.append([*start, *tokenizer.encode(answer), tokenizer.eos_token_id])
        starts.append(len(start))
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    position = torch.arange(length)
    padding = position >= torch.tensor([len(row) for row in rows]).unsqueeze(1)
    labels = ids.masked_fill(padding | (position < torch.tensor(starts).unsqueeze(1)), -100)
    return {"input_ids": ids, "attention_mask": (~padding).long(), "labels": labels}


def _train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, steps: int, seed: int) -> None:
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    for step in range(1, steps + 1):
        wrong = _WRONG if step > steps * (1 - _CARELESS) else 0.0
        loss = model(**_batch(tokenizer, generator, wrong)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def build(output: Path, steps: int = _STEPS, seed: int = 0) -> None:
    """Train the model and write it, its tokenizer and a model card to `output`."""
    torch.set_num_threads(1)  # so that sums are always added in the same order
    torch.manual_seed(seed)
    tokenizer = _make_tokenizer()
    model = _make_model(len(tokenizer))
    _train(model, tokenizer, steps, seed)
    model.generation_config = GenerationConfig(
        do_sample=True, max_new_tokens=MAX_ANSWER + 1, pad_token_id=0, eos_token_id=1
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(_CARD)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="opefo-trl playground build",
        description="Build the playground's model from scratch.",
        epilog="Page: docs/evaluation.md",
    )
    parser.add_argument("--output", type=Path, default=MODEL, help="folder to write (default: the packaged one)")
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"steps of supervised training (default: {_STEPS})")
    options = parser.parse_args(arguments)
    build(options.output, options.steps)
    print(f"Wrote {options.output}: {sum(file.stat().st_size for file in options.output.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
