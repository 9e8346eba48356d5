"""A Trainer in the terms of this package: what it must offer, how far it has come, and phases of its training."""
