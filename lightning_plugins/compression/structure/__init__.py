"""The structure of a network that is stored with its weights: read from a state dict and rebuilt."""
