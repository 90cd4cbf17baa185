"""Evaluation on benchmarks: engines, resumable samples, metrics, results, and the watching of a run."""
