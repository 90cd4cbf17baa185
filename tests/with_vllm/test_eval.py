"""eval.py with real vLLM: samples fit their log-probabilities, a killed run resumes, all six benchmarks run."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from eval_script import logp_of, samples
from material import BENCH
from peft import LoraConfig, get_peft_model
from scripts import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from opefo_trl.data.benchmarks import SIX
from opefo_trl.evaluation.results import read_results
from opefo_trl.playground import MODEL, question

COMMON = ["--gpu_memory_utilization", "0.1", "--dtype", "float32"]
SMALL = "--benchmarks playground --temperature 1 --top_p 0.9 --max_new_tokens 12 --batch_size 16 --k 16".split()  # noqa: SIM905


def command(out, *more, model="playground"):
    return [sys.executable, str(ROOT / "eval.py"), "--model", str(model), *COMMON, "--output_dir", str(out), *more]


def environment():
    """Leave out what engines in this process have set: eval.py would take itself for one of their ranks."""
    of_engines = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")
    return {name: value for name, value in os.environ.items() if name not in of_engines}


def run(*words, **options):
    done = subprocess.run(command(*words, **options), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    run(out, *SMALL)
    return out


def check_logps(frame, model):
    """Check each sample's log-probability under the model, renormalised over the nucleus that is sampled from."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    checked = 0
    for row in frame.itertuples():
        chat = [{"role": "user", "content": question(int(row.gold))}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        ids = tokenizer(row.completion)["input_ids"] + ([] if row.truncated else [tokenizer.eos_token_id])
        if len(ids) != row.tokens:
            continue  # text that does not spell its tokens
        assert row.logp == pytest.approx(logp_of(model, prompt, ids, temperature=1, top_p=0.9), abs=1e-3)
        checked += 1
    assert checked > 0.8 * len(frame)


def test_samples_have_the_models_log_probabilities(whole):
    frame = samples(whole)
    assert len(frame) == 576 and read_results(whole)["settings"]["engine"].startswith("vllm ")
    assert 0.05 < read_results(whole)["benchmarks"]["playground"]["avg"] < 0.6
    check_logps(frame, AutoModelForCausalLM.from_pretrained(MODEL))


def test_a_killed_run_resumes_to_the_same_results(whole, tmp_path):
    out = tmp_path / "killed"
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command(out, *SMALL), stdout=quiet, stderr=quiet, env=environment())
    while not list(out.glob("samples/playground/*.parquet")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # it may be done soon
    engine = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs([child for child in engine if child.is_running()], timeout=60)
    assert engine and not left  # vLLM's engine is a process of its own, and would keep the GPU
    assert 1 <= len(list(out.glob("samples/playground/*.parquet"))) < 36, "it was done before it could be killed"
    run(out, *SMALL)
    assert samples(out).equals(samples(whole))
    assert read_results(out)["benchmarks"] == read_results(whole)["benchmarks"]


def test_a_lora_adapter(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    base.config._name_or_path = base.name_or_path = str(MODEL)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "out", *SMALL, "--limit", "6", model=tmp_path / "adapter")
    check_logps(samples(tmp_path / "out"), adapted.merge_and_unload())


def test_all_six_benchmarks_go_through(long_context, tmp_path):
    words = ["--benchmark_source", str(BENCH), "--max_new_tokens", "6", "--k", "1"]
    run(tmp_path / "out", *words, model=long_context)
    results = read_results(tmp_path / "out")["benchmarks"]
    assert list(results) == list(SIX) and sum(scores["problems"] for scores in results.values()) == 1547
    assert all(scores["avg"] < 0.1 for scores in results.values())
