"""Without vLLM; with it: tests/with_vllm."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny import settings

from opefo_trl import OPEFOConfig
from opefo_trl.training.colocated_vllm import adapt_cpu_build, seed_sampling


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_cpu_build_is_named_with_both_ways_out():
    with pytest.raises(
        ImportError, match=r"`use_vllm=True` with `use_cpu=True`.*make test-vllm.*leave `use_vllm` out"
    ):
        adapt_cpu_build("float32")


def test_ranks_that_sample_as_one_share_a_seed_and_resumed_runs_get_another(out):
    def drawn(rank, step, **overrides):
        args = OPEFOConfig(**settings(out))
        args.use_vllm, args.vllm_mode = True, "colocate"
        args.vllm_tensor_parallel_size = overrides.get("tensor_parallel", 1)
        seed_sampling(args, SimpleNamespace(num_processes=2, process_index=rank), step)
        return torch.rand(1).item()

    assert drawn(0, 0) == drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0, tensor_parallel=2) == drawn(1, 0, tensor_parallel=2)
    assert len({drawn(rank, step) for rank in (0, 1) for step in (0, 5)}) == 4


def test_other_runs_keep_their_random_numbers(out):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    seed_sampling(OPEFOConfig(**settings(out)), SimpleNamespace(num_processes=2, process_index=0), 0)
    assert torch.equal(torch.rand(1), expected)
