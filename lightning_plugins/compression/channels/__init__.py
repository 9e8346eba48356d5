"""Channels that can only be removed together, and blocks: found, tried on a copy, and removed."""
