"""Metrics of representations, exact over batches and ranks.

All but `Alignment` and `Uniformity` are functions of one summed Gram matrix: cheap to update, exact however the rows
are split, and independent of how many rows there are.
"""

from lightning_plugins.metrics.alignment import Alignment
from lightning_plugins.metrics.correlation_gap import CorrelationGap
from lightning_plugins.metrics.effective_rank import EffectiveRank
from lightning_plugins.metrics.isotropy import Isotropy
from lightning_plugins.metrics.rank_me import RankMe
from lightning_plugins.metrics.uniformity import Uniformity
from lightning_plugins.metrics.von_neumann_entropy import VonNeumannEntropy

__all__ = [
    "Alignment",
    "CorrelationGap",
    "EffectiveRank",
    "Isotropy",
    "RankMe",
    "Uniformity",
    "VonNeumannEntropy",
]
