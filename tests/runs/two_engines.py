"""Train one policy on two processes, each with a vLLM engine of its own; every rank writes metrics and completions.

torchrun --nproc_per_node 2 two_engines.py MODEL OUT
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from tiny import build, digit_reward

from opefo_trl import OPEFOConfig, OPEFOTrainer


def main(model: str, out: Path) -> None:
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return digit_reward(completions)

    trainer = build(
        OPEFOTrainer,
        OPEFOConfig,
        out,
        model=model,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        flow_lambda_max=1.0,
        flow_scope="running",
        ddp_find_unused_parameters=False,
        extra={"reward_funcs": reward},
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    watched = ("flow/", "sampling/", "batching/", "entropy")
    steps = [{key: row[key] for key in row if key.startswith(watched)} for row in trainer.state.log_history[:3]]
    parameters = [value.double().sum().item() for value in trainer.model.state_dict().values()]
    result = {"steps": steps, "parameters": parameters, "completions": seen}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    del trainer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
