"""Shared parts of callbacks that measure: running statistics, the history of spectra, and figures for loggers."""
