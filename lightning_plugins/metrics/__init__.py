"""Metrics, exact over batches and ranks."""
