"""Loss terms, one method per file."""

from lightning_plugins.regularizers.coding_rate import CodingRate
from lightning_plugins.regularizers.decorrelation import Decorrelation
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm
from lightning_plugins.regularizers.invariance import InvarianceVNE
from lightning_plugins.regularizers.nuclear_norm import NuclearNorm
from lightning_plugins.regularizers.renyi_entropy import RenyiEntropy
from lightning_plugins.regularizers.sigreg import Quadrature, SIGReg
from lightning_plugins.regularizers.soft_orthogonality import SoftOrthogonality
from lightning_plugins.regularizers.spectral_norm import SpectralNorm
from lightning_plugins.regularizers.spread_out import SpreadOut
from lightning_plugins.regularizers.stable_rank import ModifiedStableRank, StableRank
from lightning_plugins.regularizers.vicreg import VICRegCovariance, VICRegVariance
from lightning_plugins.regularizers.von_neumann import VonNeumannEntropy

__all__ = [
    "CodingRate",
    "Decorrelation",
    "EmbeddingTerm",
    "InvarianceVNE",
    "ModifiedStableRank",
    "NuclearNorm",
    "Quadrature",
    "RenyiEntropy",
    "SIGReg",
    "SoftOrthogonality",
    "SpectralNorm",
    "SpreadOut",
    "StableRank",
    "VICRegCovariance",
    "VICRegVariance",
    "VonNeumannEntropy",
]
