"""Trainer support: requirements, training progress, and phases of training."""
