"""Probes from sums: moments by fold, rows that are kept, and the fits that both allow."""
