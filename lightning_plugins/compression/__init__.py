"""Smaller networks: low-rank layers, masks, costs and budgets, search of ranks, physical shrinking, reports."""

from lightning_plugins.compression.budget.budget import Budget, Projection
from lightning_plugins.compression.budget.filling import ChoiceRates, Limits
from lightning_plugins.compression.budget.projection import project
from lightning_plugins.compression.budget.shift import Multiplier
from lightning_plugins.compression.calibration.calibration import Calibration
from lightning_plugins.compression.calibration.sensitivity import output_sensitivity
from lightning_plugins.compression.channels.blocks import find_blocks, skip_blocks
from lightning_plugins.compression.channels.find import (
    channel_groups,
    find_channel_groups,
    groups_from_state,
    groups_to_state,
)
from lightning_plugins.compression.channels.group import ChannelGroup, ChannelSearch, Member
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.channels.skipped import Skipped
from lightning_plugins.compression.costs.layer_costs import LayerCost, layer_costs
from lightning_plugins.compression.costs.network_costs import Latency, LayerSize, NetworkCosts, measure_network
from lightning_plugins.compression.gates.masks import ChannelMasks, apply_masks, bake_masks, masks_of, remove_masks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.thresholds import (
    apply_thresholds,
    bake,
    remove_thresholds,
    thresholds_of,
)
from lightning_plugins.compression.low_rank.decomposition import InputMoment
from lightning_plugins.compression.low_rank.factorize import factorize
from lightning_plugins.compression.low_rank.layers import dense_weight, low_rank_layer, truncated
from lightning_plugins.compression.quantization.int8 import load_quantized, quantize
from lightning_plugins.compression.rank_search.beam_search import BeamOptions, beam_search, rich_progress
from lightning_plugins.compression.rank_search.output_energy import output_energy
from lightning_plugins.compression.rank_search.problem import RankSearch, ScoredRanks, SearchLevel
from lightning_plugins.compression.rank_search.selection import energy_threshold, equal_ratio, score_ranks, trade_off
from lightning_plugins.compression.reports.report import CompressionReport, LayerChange, UnitsKept, compression_report
from lightning_plugins.compression.structure.compressed_folder import load_compressed, save_compressed
from lightning_plugins.compression.structure.configuration import update_configuration
from lightning_plugins.compression.structure.restore_structure import restore_structure

__all__ = [
    "BeamOptions",
    "Budget",
    "Calibration",
    "ChannelGroup",
    "ChannelMasks",
    "ChannelSearch",
    "ChoiceRates",
    "CompressionReport",
    "InputMoment",
    "Latency",
    "LayerChange",
    "LayerCost",
    "LayerSize",
    "Limits",
    "Member",
    "Multiplier",
    "NetworkCosts",
    "Projection",
    "RankSearch",
    "RankThresholds",
    "ScoredRanks",
    "SearchLevel",
    "Skipped",
    "UnitsKept",
    "apply_masks",
    "apply_thresholds",
    "bake",
    "bake_masks",
    "beam_search",
    "channel_groups",
    "compression_report",
    "dense_weight",
    "energy_threshold",
    "equal_ratio",
    "factorize",
    "find_blocks",
    "find_channel_groups",
    "groups_from_state",
    "groups_to_state",
    "layer_costs",
    "load_compressed",
    "load_quantized",
    "low_rank_layer",
    "masks_of",
    "measure_network",
    "output_energy",
    "output_sensitivity",
    "project",
    "quantize",
    "remove_masks",
    "remove_thresholds",
    "restore_structure",
    "rich_progress",
    "save_compressed",
    "score_ranks",
    "shrink",
    "skip_blocks",
    "thresholds_of",
    "trade_off",
    "truncated",
    "update_configuration",
]
