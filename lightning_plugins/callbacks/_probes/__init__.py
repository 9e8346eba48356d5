"""What a probe of layers needs of a batch, of the module and of its copies."""
