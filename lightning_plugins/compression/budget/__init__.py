"""Channels and ranks under one budget: the differentiable cost, the shift that meets it, and the final projection."""
