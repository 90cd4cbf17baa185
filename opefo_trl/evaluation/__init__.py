"""Samples of a model on benchmarks: engines, resumable samples, metrics, results."""
