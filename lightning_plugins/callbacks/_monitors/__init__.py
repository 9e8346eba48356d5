"""What callbacks that measure share: running statistics, the history of spectra, and figures for loggers."""
