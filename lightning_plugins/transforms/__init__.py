"""Augmentations of point clouds with boxes: plain callables, for any training loop and any data loader."""

from lightning_plugins.transforms.batch import BatchAugmentation, collate_frames
from lightning_plugins.transforms.flip_rotate_scale import FlipRotateScale
from lightning_plugins.transforms.polar_mix import PolarMix
from lightning_plugins.transforms.whole_body import GroundTruthSampling, WholeBodyAugmentation

__all__ = [
    "BatchAugmentation",
    "FlipRotateScale",
    "GroundTruthSampling",
    "PolarMix",
    "WholeBodyAugmentation",
    "collate_frames",
]
