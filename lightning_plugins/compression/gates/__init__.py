"""Learned masks on channels and learned thresholds on singular values, as parametrizations of weights."""
