"""Grade on two ranks, forked from a process that has graded already, as in a notebook; write FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from opefo_trl.rewards import math_reward

GOLDS = ["1/2", "3", "x^2 - 1", "69,84", "5"]
TEXTS = [r"\boxed{0.5}", r"\boxed{4}", r"\boxed{(x-1)(x+1)}", r"\boxed{84, 69}", "five"]


def grade(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rewards = math_reward(TEXTS, GOLDS)
    dist.barrier()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(rewards))
    dist.destroy_process_group()


if __name__ == "__main__":
    first = math_reward(TEXTS, GOLDS)
    mp.start_processes(grade, (sys.argv[1],), nprocs=2, start_method="fork")
    assert math_reward(TEXTS, GOLDS) == first
    (Path(sys.argv[1]) / "parent.json").write_text(json.dumps(first))
