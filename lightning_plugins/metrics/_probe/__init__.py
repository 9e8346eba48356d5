"""Probes from sums: moments by fold, stored rows, and fits to both."""
