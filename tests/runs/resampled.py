"""Take two optimizer steps of 12 rows with dynamic sampling, over any number of processes; every rank writes a file.
Before that, two steps with completions that are sampled, whose scores travel with the rows.

    torchrun --nproc_per_node 2 resampled.py OUT

Groups have four rows and a rank of two has six, so the second of three groups is split between them. In the first
rollout the third group alone has no signal, and the fresh group that replaces it is made on the first rank.
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tiny import PROMPTS, Gradients, build, digit_reward, metrics, scripted_rollout

from opefo_trl import OPEFOConfig, OPEFOTrainer

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FLAT = {PROMPTS[2], PROMPTS[6]}


class Measured(OPEFOTrainer):
    """Compares the scores that generation has taken with those of a scoring pass."""

    moved = 0

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.generation_scores.taken:
            gap = self._score(batch) - batch["logps"]
            largest = (gap * batch["completion_mask"]).abs().max().item()
            self.gaps = [*getattr(self, "gaps", []), largest]
        return batch

    def _generate_single_turn(self, prompt_ids, *args):
        self.generated = [*getattr(self, "generated", []), *map(tuple, prompt_ids)]
        return super()._generate_single_turn(prompt_ids, *args)

    def _assemble(self, prompts):
        assembled = super()._assemble(prompts)
        self.moved += sum(tuple(row) not in self.generated for row in assembled[0])
        self.generated = []
        return assembled


class Scripted(OPEFOTrainer):
    """Generates completions by prompt and place in the group alone, and notes the prompts of each rollout."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        prompts = self.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        self.trained = [*getattr(self, "trained", []), prompts]
        return batch

    def _generate_single_turn(self, prompt_ids, *args):
        prompts = self.processing_class.batch_decode(prompt_ids)
        first = self.accelerator.process_index * len(prompts) % self.num_generations
        rollout = scripted_rollout(prompts[:1] * first + prompts, self)  # which counts places from its first row
        return rollout["completion_ids"][first:], None


def main(out: Path) -> None:
    graded = []

    def reward(prompts, completions, log_extra, **_):
        graded.append(prompts)
        log_extra("length", [len(completion) for completion in completions])
        rewards = digit_reward(completions)
        return [0.0 if prompt in FLAT else reward for prompt, reward in zip(prompts, rewards, strict=True)]

    gradients = Gradients()
    run = {
        "per_device_train_batch_size": 12 // WORLD,
        "shuffle_dataset": False,
        "resample_rounds": 2,
        "zero_advantage_tokens": "leave_out",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "ddp_find_unused_parameters": False,
    }
    measured = build(Measured, OPEFOConfig, out / "measured", **run, extra={"reward_funcs": reward})
    measured.train()
    graded.clear()
    trainer = build(Scripted, OPEFOConfig, out, **run, extra={"reward_funcs": reward, "callbacks": [gradients]})
    trainer.train()
    columns = [trainer._logs["prompt"], trainer._logs["completion"], trainer._logs["extra"]["length"]]
    result = {
        "world": trainer.accelerator.num_processes,
        "flat_at_first": sum(prompt in FLAT for prompt in graded[0]),
        "trained": trainer.trained,
        "order": trainer.prompt_order.state_dict(),
        "table": list(zip(*columns, strict=True)),
        "gaps": getattr(measured, "gaps", []),
        "moved": measured.moved,
        "metrics": metrics(trainer, skip=("time", "train_", "batching/padding"))[0] if RANK == 0 else {},
    }
    (out / f"rank-{RANK}.json").write_text(json.dumps(result))
    if RANK == 0:
        torch.save(gradients.last, out / "gradient.pt")
    del trainer, measured
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
