"""Real vLLM on the CPU. These tests have an environment of their own: `make test-vllm`."""

import os

for key, value in {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
    os.environ.setdefault(key, value)
