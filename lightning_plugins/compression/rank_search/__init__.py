"""Ranks for many layers at once: beam search over truncated networks and choices from weights alone."""
