"""Terms of a loss, one method a file."""

from lightning_plugins.regularizers.invariance import InvarianceVNE
from lightning_plugins.regularizers.stable_rank import ModifiedStableRank, StableRank
from lightning_plugins.regularizers.von_neumann import VonNeumannEntropy

__all__ = ["InvarianceVNE", "ModifiedStableRank", "StableRank", "VonNeumannEntropy"]
