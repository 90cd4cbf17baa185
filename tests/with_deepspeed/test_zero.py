"""The recipes for DeepSpeed ZeRO-2 and ZeRO-3 take the steps of DDP, on two processes without a GPU.

make test-deepspeed        # in an environment of its own, .venv-deepspeed
"""

from pathlib import Path

import pytest
import yaml
from scripts import ROOT, python

from opefo_trl.curves import EntropyCurves

RECIPES = ROOT / "configs" / "accelerate"
STEPS = 3
RUN = f"""
    --max_steps {STEPS} --eval_prompts 0 --save_strategy no --num_generations 4
    --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --flow_target none --flow_lambda_max 1.0
""".split()
SAME = "reward entropy flow/increase flow/decrease flow/lambda batching/padding batching/skipped_rows".split()  # noqa: SIM905
pytestmark = pytest.mark.timeout(600)


def on_a_cpu(recipe: Path, folder: Path) -> Path:
    """Copy a recipe and set it to two processes on a CPU."""
    machine = yaml.safe_load(recipe.read_text()) | {"use_cpu": True, "mixed_precision": "no", "num_processes": 2}
    path = folder / recipe.name
    path.write_text(yaml.safe_dump(machine))
    return path


def curves(recipe: str, scope: str, folder: Path):
    out = folder / f"{recipe}-{scope}"
    machine = on_a_cpu(RECIPES / f"{recipe}.yaml", folder)
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", machine]
    words = [ROOT / "train.py", *RUN, "--flow_scope", scope, "--output_dir", out]
    # without DS_ACCELERATOR, DeepSpeed counts cores with numactl
    python(*launch, *words, cwd=folder, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    return EntropyCurves.load(out).to_pandas()


@pytest.mark.parametrize("scope", ["running", "batch"])
def test_zero_takes_the_steps_of_ddp(scope, tmp_path):
    ddp = curves("cpu", scope, tmp_path)
    assert len(ddp) == STEPS and ddp["flow/lambda"].abs().max() > 0.01
    for recipe in ("zero2", "zero3"):
        zero = curves(recipe, scope, tmp_path)
        for name in SAME:
            assert zero[name].tolist() == pytest.approx(ddp[name].tolist(), abs=1e-4), (recipe, name)
