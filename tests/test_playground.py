"""The task, its data, and the model that comes with the package."""

import hashlib
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import MODEL, SPLITS, playground_dataset, playground_reward, resolve_model
from opefo_trl.playground.build import build
from opefo_trl.playground.task import MAX_ANSWER, TARGETS, is_right, question, random_expression, value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3*8", 24),
        ("(7-1)*4", 24),
        ("2+3*4", 14),
        ("20-5-5", 10),  # from the left
        ("48/2/2", 12),
        ("7/2*4", 14),  # exact on the way
        ("1/3", Fraction(1, 3)),
        ("((1+2))*3", 9),
    ],
)
def test_values(answer, expected):
    assert value(answer) == expected


@pytest.mark.parametrize(
    "answer",
    ["", "24", "(24)", "3--4", "-3+27", "+3+4", "03+21", "3*8=24", "3 * 8", "3*8+", "(3*8", "3*8)", "()", "2**3",
     "4//2", "5/0", "5/(3-3)", "2(3)", "3*x", "٣+٣", "1e9+1", "(" * 5000 + "1+1" + ")" * 5000],
)  # fmt: skip
def test_what_is_not_an_expression_has_no_value(answer):
    assert value(answer) is None


@given(st.recursive(
    st.integers(1, 50).map(str),
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(lambda trio: "({}{}{})".format(*trio)),
    max_leaves=8,
))  # fmt: skip
def test_values_are_those_of_python(answer):
    integers = iter(answer)
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in _parts(integers))
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    if answer.isdigit():
        expected = None  # one number is no expression
    assert value(answer) == expected


def _parts(characters):
    number = ""
    for character in characters:
        if character.isdigit():
            number += character
            continue
        if number:
            yield number
        number = ""
        yield character
    if number:
        yield number


def test_the_reward_takes_texts_and_conversations():
    answers = ["3*8", " 3*8\n", "3*9", "24"]
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert playground_reward(answers, target=[24] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert playground_reward(chats, target=[24] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_random_expressions_are_right_and_short():
    generator = random.Random(0)
    for _ in range(500):
        answer, target = random_expression(generator)
        assert is_right(answer, target) and target in TARGETS and len(answer) <= MAX_ANSWER


def test_held_out_prompts_are_never_trained_on():
    train, test = playground_dataset("train"), playground_dataset("test")
    assert not set(train["target"]) & set(test["target"])
    assert sorted([*train["target"], *test["target"]]) == list(TARGETS)
    assert train[0]["prompt"] == [{"role": "user", "content": question(train[0]["target"])}]
    with pytest.raises(ValueError, match="`split='validation'`.*'train', 'test'"):
        playground_dataset("validation")
    assert set(SPLITS) == {"train", "test"}


def test_only_the_name_means_the_playground(tmp_path):
    assert resolve_model("playground") == str(MODEL)
    assert resolve_model("./playground") == "./playground"
    model = object()
    assert resolve_model(model) is model


# ---- the model


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


def test_it_begins_where_there_is_something_to_learn_and_to_lose(out):
    """Reward 0.10 to 0.50, entropy of at least 0.8 nats, a right answer among 64 to 95 % of all questions."""
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


def test_a_build_comes_out_the_same_byte_for_byte(tmp_path):
    threads = torch.get_num_threads()
    try:
        build(tmp_path / "a", steps=5)
        torch.manual_seed(17)  # whatever happened before
        build(tmp_path / "b", steps=5)
    finally:
        torch.set_num_threads(threads)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in MODEL.iterdir()}
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "README.md"):
        assert (tmp_path / "a" / file).read_text() == (MODEL / file).read_text(), file
    with (
        safe_open(tmp_path / "a" / "model.safetensors", "pt") as ours,
        safe_open(MODEL / "model.safetensors", "pt") as shipped,
    ):
        shapes = [{name: file.get_tensor(name).shape for name in file.keys()} for file in (ours, shipped)]  # noqa: SIM118
        assert shapes[0] == shapes[1]


def _hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
