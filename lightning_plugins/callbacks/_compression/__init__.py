"""What callbacks that compress share: settings, phases, the search of ranks, the record and the report."""
