"""The parts of `tools/gpu_check.py`, in the order in which it runs them."""
