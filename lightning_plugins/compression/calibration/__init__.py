"""What layers receive, over the batches of a data set: second moments, and the loss's sensitivity to outputs."""
