"""Shared parts of callbacks that compress: settings, phases, the search of ranks, the record and the report."""
