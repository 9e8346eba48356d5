"""Layers as products of two smaller ones: which layers can be split, their factors, and whole networks split."""
