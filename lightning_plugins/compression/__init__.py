"""Smaller networks: low-rank layers, masks, costs and budgets, search of ranks, physical shrinking, reports."""

from lightning_plugins.compression._rank_problem import RankSearch, ScoredRanks, SearchLevel
from lightning_plugins.compression.beam_search import beam_search, rich_progress
from lightning_plugins.compression.cost import LayerCost, layer_costs
from lightning_plugins.compression.factorize import factorize
from lightning_plugins.compression.low_rank import dense_weight, low_rank_layer, truncated
from lightning_plugins.compression.network_costs import Latency, LayerSize, NetworkCosts, measure_network
from lightning_plugins.compression.rank_selection import energy_threshold, equal_ratio, score_ranks, trade_off
from lightning_plugins.compression.report import CompressionReport, LayerChange, compression_report
from lightning_plugins.compression.restore_structure import restore_structure

__all__ = [
    "CompressionReport",
    "Latency",
    "LayerChange",
    "LayerCost",
    "LayerSize",
    "NetworkCosts",
    "RankSearch",
    "ScoredRanks",
    "SearchLevel",
    "beam_search",
    "compression_report",
    "dense_weight",
    "energy_threshold",
    "equal_ratio",
    "factorize",
    "layer_costs",
    "low_rank_layer",
    "measure_network",
    "restore_structure",
    "rich_progress",
    "score_ranks",
    "trade_off",
    "truncated",
]
