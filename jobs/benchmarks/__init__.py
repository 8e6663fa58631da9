"""The benchmarks of jobs/benchmark.py, one file each: `run` is the command."""
