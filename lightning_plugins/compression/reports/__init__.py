"""A network before and after compression: the report, its table, and the exported network."""
