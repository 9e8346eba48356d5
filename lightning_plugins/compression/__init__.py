"""Smaller networks: low-rank layers, masks, costs and budgets, search of ranks, physical shrinking, reports."""

from lightning_plugins.compression.cost import LayerCost, layer_costs
from lightning_plugins.compression.factorize import factorize
from lightning_plugins.compression.low_rank import dense_weight, low_rank_layer, truncated

__all__ = ["LayerCost", "dense_weight", "factorize", "layer_costs", "low_rank_layer", "truncated"]
