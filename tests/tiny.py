"""The smallest real model and data that GRPO can train: a character vocabulary, two layers, a reward on text."""

import math

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

ALPHABET = "0123456789+-*/=() abc"
PROMPTS = ["1+1=", "2*3=", "9-4=", "(1+2)*3=", "8/2=", "7+0=", "5-5=", "6*1="]


# Of models of any architecture
SIZES = {
    "vocab_size": len(ALPHABET) + 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def tiny_model(seed: int = 0, sharpness: float = 6.0) -> Qwen2ForCausalLM:
    """Build a random policy. `sharpness` scales its head, so that some tokens are likely and others are not."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False, torch_dtype="float32"))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def tiny_dataset(repeats: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeats})


def digit_reward(completions: list[str], **_: object) -> list[float]:
    """Return the share of digits, which differs within a group and depends on likely tokens."""
    return [sum(c.isdigit() for c in completion) / (1 + len(completion)) for completion in completions]


def settings(output_dir: object, **overrides: object) -> dict[str, object]:
    """Return the arguments of a quick, silent CPU run, for GRPOConfig and OPEFOConfig alike."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "seed": 3,
        **overrides,
    }


def scripted_rollout(prompts: list[str], trainer: object) -> dict[str, object]:
    """Write completions by prompt and index in the group alone: the same for any number of processes."""
    tokenizer, generations = trainer.processing_class, trainer.num_generations
    rollout: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(1000 * PROMPTS.index(prompt) + index % generations)
        length = int(torch.randint(3, 12, (1,), generator=generator))
        completion = torch.randint(2, len(ALPHABET) + 2, (length,), generator=generator).tolist()
        rollout["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        rollout["completion_ids"].append([*completion, tokenizer.eos_token_id])
    return rollout


def build(trainer_class: type, config_class: type, output_dir: object, model: object = None, **overrides: object):
    """Build a silent trainer of the tiny model; `extra` goes to the trainer, everything else to the config."""
    extra = dict(overrides.pop("extra", {}))
    trainer = trainer_class(
        tiny_model() if model is None else model,
        extra.pop("reward_funcs", digit_reward),
        config_class(**settings(output_dir, **overrides)),
        train_dataset=extra.pop("train_dataset", None) or tiny_dataset(),
        processing_class=tiny_tokenizer(),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(*arguments: object, **overrides: object):
    """Build a trainer and run it."""
    trainer = build(*arguments, **overrides)
    trainer.train()
    return trainer


def parameters(trainer: object) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_all_moved(trainer: object) -> None:
    """Check that all parameters are finite, and that each one which is trained has left its value in `tiny_model`."""
    before = tiny_model().state_dict()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.requires_grad and name in before:  # an adapter has parameters of its own
            assert not torch.equal(before[name].to(parameter.dtype), parameter.data), name


def metrics(
    trainer: object, skip: tuple[str, ...] = ("step_time", "train_", "eval_runtime", "_per_second")
) -> list[dict]:
    """Return the logged rows without measured times."""
    return [
        {key: value for key, value in row.items() if not any(word in key for word in skip)}
        for row in trainer.state.log_history
    ]


def assert_equal_runs(ours, theirs):
    """Compare all parameters and all that TRL logs, bit for bit."""
    for name, value in parameters(theirs).items():
        assert torch.equal(parameters(ours)[name], value), name
    for our_row, their_row in zip(metrics(ours), metrics(theirs), strict=True):
        assert {key: our_row.get(key) for key in their_row} == their_row


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step, gathered where they are sharded."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor, on all ranks at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


class OneRank:
    """An accelerator of a run in one process."""

    num_processes, optimizer_step_was_skipped = 1, False
    device = torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def recorded(monkeypatch, owner: type, name: str) -> list[tuple]:
    """Record the calls of a method, as (instance, args, kwargs, result)."""
    calls, original = [], getattr(owner, name)

    def record(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append((self, args, kwargs, result))
        return result

    monkeypatch.setattr(owner, name, record)
    return calls


def relative_difference(left, right) -> float:
    """Return |left - right| / |right| of two sets of gradients."""
    assert left.keys() == right.keys()
    apart = sum((left[name] - right[name]).double().square().sum() for name in left)
    size = sum(value.double().square().sum() for value in right.values())
    return math.sqrt(apart / size)
