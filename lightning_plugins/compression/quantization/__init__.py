"""Integers for the weights of a network, after everything else that makes it smaller."""
