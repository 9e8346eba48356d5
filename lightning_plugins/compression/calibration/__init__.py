"""Statistics of layers over the batches of a data set: second moments of inputs, sensitivity of the loss to outputs."""
