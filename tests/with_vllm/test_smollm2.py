"""vLLM samples from a real language model while it is trained: SmolLM2-135M-Instruct, in float32."""

import pytest
from peft import LoraConfig

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import TASKS, words_reward

LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def length(completions, **_):
    """Tell completions apart even where no word is right, so that every step moves the weights."""
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize(("adapter", "rate"), [(None, 2e-5), (LORA, 1e-3)], ids=["full", "adapter"])
def test_vllm_follows_the_weights(adapter, rate, smollm2_folder, tmp_path):
    args = OPEFOConfig(
        str(tmp_path), flow_target=1.0, max_steps=5, learning_rate=rate, lr_scheduler_type="constant", temperature=0.7,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8, use_cpu=True, bf16=False,
        gradient_checkpointing=False, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=64, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = OPEFOTrainer(
        str(smollm2_folder),
        [words_reward, length],
        args,
        train_dataset=TASKS["words"].dataset("train"),
        peft_config=adapter,
    )
    trainer.train()
    rows = trainer.state.log_history[:5]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-3
    assert all(0.5 < row["entropy"] < 4 and row["grad_norm"] > 0 for row in rows)
