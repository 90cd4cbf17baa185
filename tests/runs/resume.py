"""Train the tiny model for 8 steps with a checkpoint every 2, once for each scope; be killed, or resume from step 4.

Each run that is to be killed is a process of its own, forked before torch has done any work.

python resume.py OUT {whole,crash,resume} SCOPE [SCOPE ...]
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import build, metrics, parameters
from transformers import TrainerCallback

from opefo_trl import OPEFOConfig, OPEFOTrainer

CRASH_AT = 5


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == CRASH_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(out: Path, mode: str, scope: str) -> None:
    overrides = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "flow_scope": scope,
        "flow_target": "0.95x",
    }
    extra = {"callbacks": [Crash()] if mode == "crash" else []}
    trainer = build(OPEFOTrainer, OPEFOConfig, out, extra=extra, **overrides)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4") if mode == "resume" else None)
    result = {
        "metrics": metrics(trainer),
        "parameters": {name: value.double().flatten().tolist() for name, value in parameters(trainer).items()},
    }
    (out / f"{mode}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    folder, mode, *scopes = sys.argv[1:]
    for scope in scopes:
        if mode != "crash":
            run(Path(folder) / scope, mode, scope)
        elif child := os.fork():
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        else:
            run(Path(folder) / scope, mode, scope)
            os._exit(1)  # SIGKILL did not come
