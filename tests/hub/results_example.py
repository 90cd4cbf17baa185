"""Results of eval.py, as `results.json` holds them."""

SCORES = {"majority": 0.2, "truncated": 0.1, "tokens": 300.0, "entropy": None, "calibration": None}
RESULTS = {
    "model": "m",
    "settings": {
        **{"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512, "seed": 0, "prompt_template": "boxed"},
        **{"limit": None, "engine": "vllm 0.31", "grader": "math-verify 0.9", "policy": "lenient"},
    },
    "benchmarks": {
        "aime24": {
            **{"title": "AIME 2024", "problems": 30, "k": 32, "avg": 0.125, "interval": [0.07, 0.19], **SCORES},
            **{"pass": {"1": 0.125, "32": 0.4}, "outcomes": {"correct": 120, "wrong": 800, "no_answer": 40}},
        },
        "playground": {
            **{"title": "playground", "problems": 18, "k": 1, "avg": 0.5, "interval": [0.3, 0.7], **SCORES},
            **{"pass": {"1": 0.5}, "outcomes": {"correct": 9, "wrong": 9, "no_answer": 0}},
        },
    },
}
