"""The model that comes with the package, and how it is built."""

import hashlib

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import MODEL, playground_dataset, playground_reward
from opefo_trl.playground.build import build
from opefo_trl.playground.task import MAX_ANSWER


def test_the_weights_are_small_and_fit_vllm():
    assert (MODEL / "model.safetensors").stat().st_size <= 2_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.config.model_type == "qwen2"
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert 300_000 <= model.num_parameters() <= 1_000_000


def test_the_tokenizer_reads_any_text_and_has_a_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("Make 24", "3*(8+1)/20-5", "Let $x^2 = 4$; é ∑ 漢\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("(12+13)*3")) == len("(12+13)*3")  # a token a character
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Make 24"}], add_generation_prompt=True)
    assert tokenizer.decode(chat["input_ids"]) == "<|user|>Make 24<|assistant|>"


@pytest.mark.slow
def test_training_begins_with_much_to_learn_and_entropy_to_lose(out):
    """Check reward, entropy in nats, and the share of questions with a right one among 64 answers."""
    args = OPEFOConfig(
        str(out), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_completion_length=MAX_ANSWER + 1,
        num_generations_eval=64, per_device_eval_batch_size=64 * 18,
    )  # fmt: skip
    trainer = OPEFOTrainer(
        "playground", playground_reward, args, train_dataset=playground_dataset(), eval_dataset=playground_dataset()
    )
    for questions in (playground_dataset("train"), playground_dataset("test")):
        scores = trainer.evaluate(questions)
        assert 0.10 <= scores["eval_reward"] <= 0.50
        assert scores["eval_entropy"] >= 0.8
        assert scores["eval_answers/solved"] >= 0.95


@pytest.mark.slow
def test_a_build_comes_out_the_same_byte_for_byte(tmp_path):
    threads = torch.get_num_threads()
    try:
        build(tmp_path / "a", steps=5)
        torch.manual_seed(17)  # the state of the generator does not matter
        build(tmp_path / "b", steps=5)
    finally:
        torch.set_num_threads(threads)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in MODEL.iterdir()}
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "README.md"):
        built = (tmp_path / "a" / file).read_text().replace(transformers.__version__, "5.17.0")  # of the shipped one
        assert built == (MODEL / file).read_text(), file
    with (
        safe_open(tmp_path / "a" / "model.safetensors", "pt") as ours,
        safe_open(MODEL / "model.safetensors", "pt") as shipped,
    ):
        shapes = [{name: file.get_tensor(name).shape for name in file.keys()} for file in (ours, shipped)]  # noqa: SIM118
        assert shapes[0] == shapes[1]


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
