"""Rows of a layer: tensors captured while a step runs, selected, masked, read in their layout, and pooled."""
