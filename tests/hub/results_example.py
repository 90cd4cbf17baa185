"""Results of eval.py, as `results.json` holds them."""

RESULTS = {
    "model": "m",
    "settings": {
        **{"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512, "seed": 0, "prompt_template": "boxed"},
        **{"limit": None, "engine": "vllm 0.31", "grader": "math-verify 0.9", "policy": "lenient"},
    },
    "benchmarks": {
        "aime24": {
            **{"title": "AIME 2024", "problems": 30, "k": 32, "avg": 0.125, "standard_error": 0.03},
            **{"interval": [0.07, 0.19], "pass": {"1": 0.125, "32": 0.4}, "majority": 0.2, "truncated": 0.1},
            "outcomes": {"correct": 120, "wrong": 800, "no_answer": 40, "timeout": 0, "error": 0},
            **{"tokens": 300.0, "entropy": 0.4, "calibration": 0.1},
        },
        "playground": {
            **{"title": "playground", "problems": 18, "k": 1, "avg": 0.5, "standard_error": 0.1},
            **{"interval": [0.3, 0.7], "pass": {"1": 0.5}, "majority": 0.5, "truncated": 0.0},
            "outcomes": {"correct": 9, "wrong": 9, "no_answer": 0, "timeout": 0, "error": 0},
            **{"tokens": 6.0, "entropy": None, "calibration": None},
        },
    },
}
