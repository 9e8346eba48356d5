"""Parts of a probe of layers: rows of a batch, the module and its copies."""
