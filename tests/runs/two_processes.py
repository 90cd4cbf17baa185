"""Take an optimizer step of 16 scripted rows over any number of processes; rank 0 writes metrics and gradients.

    torchrun --nproc_per_node 2 two_processes.py OUT [fsdp]

With `fsdp` the model is sharded by FSDP2. accelerate takes FSDP only for `MULTI_GPU`, and PartialState calls processes
on a CPU `MULTI_CPU`, so that is replaced; the sharding and the collectives are real, over gloo.
"""

import gc
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny import PROMPTS, Gradients, build, digit_reward, scripted_rollout, tiny_model, whole

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, Control

FSDP = "fsdp" in sys.argv
if FSDP:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    plain_init = PartialState.__init__

    def init_as_gpus(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_as_gpus


class PoisonLastRank(Control):
    """Make the loss of the last rank NaN."""

    def advantages(self, tokens):
        last = dist.get_rank() == dist.get_world_size() - 1
        return tokens.advantages * (math.nan if last else 1.0)


CONTROLS["poison"] = PoisonLastRank


def last_rank_is_infinite(completions, **_):
    rewards = digit_reward(completions)
    if dist.get_rank() == dist.get_world_size() - 1:
        rewards[2] = math.inf
    return rewards


def flat_on_last_rank(prompts, completions, **_):
    """Give zero advantage to the second half of a step's prompts: all rows of the last of two ranks."""
    rewards = digit_reward(completions)
    return [0.0 if prompt in PROMPTS[2:4] else reward for prompt, reward in zip(prompts, rewards, strict=True)]


def right_on_last_rank(prompts, completions, **_):
    """Solve the second half of a step's prompts always."""
    rewards = digit_reward(completions)
    return [1.0 if prompt in PROMPTS[2:4] else reward for prompt, reward in zip(prompts, rewards, strict=True)]


class ImagesOnLastRank(OPEFOTrainer):
    """Looks like a vision model's rollout in which only the last rank has images."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self._is_vlm = True
        images = {"num_images": [1] * len(batch["advantages"])}
        return batch | images if self.accelerator.process_index + 1 == self.accelerator.num_processes else batch


IDLE = {"shuffle_dataset": False, "extra": {"reward_funcs": flat_on_last_rank}}


def sixteen_rows(out, **overrides):
    """Build a trainer of 16 rows a step, shared by all processes, and the callback that keeps its gradients."""
    gradients = Gradients()
    extra = {"rollout_func": scripted_rollout, "callbacks": [gradients], **overrides.pop("extra", {})}
    trainer_class = overrides.pop("trainer_class", OPEFOTrainer)
    run = {"gradient_accumulation_steps": 2, **overrides}
    rows = 16 // int(os.environ["WORLD_SIZE"]) // run["gradient_accumulation_steps"]
    common = {"max_steps": 1, "max_grad_norm": 0.0, "flow_lambda_max": 1.0, "ddp_find_unused_parameters": False}
    trainer = build(trainer_class, OPEFOConfig, out, per_device_train_batch_size=rows, extra=extra, **common, **run)
    return trainer, gradients


def main(out: Path) -> None:
    results, sampled = {}, {}
    for name, overrides in {
        "batch": {},
        "live": {"gradient_accumulation_steps": 1},
        "covariance": {"flow_estimator": "covariance"},
        "exact": {"flow_estimator": "exact"},
        "running": {"flow_scope": "running"},
        "idle": IDLE,
        "images": {"trainer_class": ImagesOnLastRank},
        "idle_running": {"flow_scope": "running", **IDLE},
        "additive": {"flow_shape": "additive"},
        "held": {"flow_target": "1.5x", "shuffle_dataset": False, "extra": {"reward_funcs": right_on_last_rank}},
    }.items():
        if FSDP and name in ("live", "covariance", "running", "images"):
            continue
        trainer, gradients = sixteen_rows(out, **overrides)
        trainer.train()
        if trainer.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            torch.save(gradients.last, out / f"{name}.pt")
            sampled[name] = [sample["length"] for sample in trainer.curves.samples]
        row = trainer.state.log_history[0]
        watched = ("flow/", "entropy", "batching/skipped_rows", "clip_ratio/")
        results[name] = {key: row[key] for key in row if key.startswith(watched)}
    trainer, _ = sixteen_rows(out, flow_estimator="exact", extra={"rollout_func": None})
    trainer.train()
    scores = trainer.generation_scores
    results["generated"] = {"confirmed": scores.confirmed, "used": scores.taken, "reason": scores.reason}
    world = trainer.accelerator.num_processes
    results["model"] = type(trainer.model).__name__

    if world > 1:
        for name, broken in {
            "loss": {"control": "poison"},
            "reward": {"extra": {"reward_funcs": last_rank_is_infinite}},
            "skip": {"control": "poison", "nonfinite": "skip"},
        }.items():
            trainer, _ = sixteen_rows(out, **broken)
            try:
                trainer.train()
                message = f"skipped {trainer.guard.skipped}"
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
            unchanged = all(
                torch.equal(whole(p), q)
                for p, q in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True)
            )
            results[name] = [None] * world
            dist.all_gather_object(results[name], (message, unchanged))

    if trainer.accelerator.is_main_process:
        (out / "results.json").write_text(json.dumps({"world": world, "sampled": sampled, **results}))
    del trainer
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
