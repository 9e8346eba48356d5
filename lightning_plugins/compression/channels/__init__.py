"""Channels that can only be removed together: found, tried on a copy, and removed."""
