"""Parts of benchmarks/compare_controls.py: settings, runs, statistics, tables and figures of a comparison."""
