"""Smaller networks: low-rank layers, masks, costs and budgets, search of ranks, physical shrinking, reports."""
