"""A network as the rooms of compression handle it: evaluation mode, parametrizations, tracing, replaced parameters."""
