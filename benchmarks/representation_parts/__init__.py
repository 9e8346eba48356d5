"""The four trainings of `benchmarks/representations.py`, one file each."""
