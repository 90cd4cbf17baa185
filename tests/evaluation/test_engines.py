"""Samples of transformers: their log-probabilities, limits and seeds. (vLLM's: tests/with_vllm.)"""

import pytest
from eval_script import logp_of
from transformers import AutoModelForCausalLM

from opefo_trl.evaluation.engines import Decoding, Transformers, resolve_engine, seed_of
from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.evaluation.samples import load_problems, tokenize_problems
from opefo_trl.playground import MODEL

SOURCE = ModelSource("playground")


@pytest.fixture(scope="module")
def tokenizer():
    return SOURCE.tokenizer()


@pytest.mark.parametrize("decoding", [Decoding(1.0, 1.0, 12), Decoding(0.6, 0.9, 12), Decoding(0.0, 1.0, 12)])
def test_log_probabilities_are_those_of_the_distribution_that_is_sampled_from(tokenizer, decoding):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    prompts = tokenize_problems(load_problems("playground")[:3], tokenizer, "none", None) * 4
    prompts[1] = prompts[1] + prompts[1]  # rows of different lengths
    samples = Transformers(SOURCE, decoding, tokenizer).sample(prompts, [3] * 12, [12] * 12)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = tokenizer(sample.text)["input_ids"] + ([] if sample.truncated else [tokenizer.eos_token_id])
        assert len(ids) == sample.tokens
        expected = logp_of(model, prompt, ids, decoding.temperature, decoding.top_p)
        assert sample.logp == pytest.approx(expected, abs=1e-4)


def test_rows_stop_at_their_own_limit_and_say_that_they_are_truncated(tokenizer):
    prompts = tokenize_problems(load_problems("playground")[:2], tokenizer, "none", None)
    samples = Transformers(SOURCE, Decoding(1.0, 1.0, 12), tokenizer).sample(prompts * 6, [0] * 12, [2, 12] * 6)
    assert all(sample.tokens == 2 and sample.truncated for sample in samples[::2])
    assert any(sample.tokens > 2 for sample in samples[1::2])
    assert not any(sample.truncated for sample in samples[1::2] if sample.tokens < 12)


def test_seeds_are_distinct_and_stay():
    seeds = [seed_of(seed, name, sample) for seed in (0, 1) for name in "ab" for sample in range(100)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "aime24", "aime24-60", 3) == 319078851


def test_the_engine_is_vllm_only_if_it_is_installed(monkeypatch):
    monkeypatch.setattr("opefo_trl.evaluation.engines.find_spec", lambda name: None)
    assert resolve_engine("auto")[0] == "transformers" and resolve_engine("transformers")[1].startswith(
        "transformers "
    )
    with pytest.raises(ImportError, match=r"`engine='vllm'`.*trl\[vllm\]"):
        resolve_engine("vllm")
    monkeypatch.setattr("opefo_trl.evaluation.engines.find_spec", lambda name: name)
    assert resolve_engine("auto")[0] == "vllm" and resolve_engine("transformers")[0] == "transformers"
