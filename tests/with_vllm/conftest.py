"""Real vLLM on the CPU. These tests have an environment of their own: `make test-vllm`."""

import gc
import os

import pytest

for key, value in {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
    os.environ.setdefault(key, value)


@pytest.fixture(autouse=True)
def free_engine():
    """Free the engine of the test before the next one takes a gigabyte."""
    yield
    gc.collect()
