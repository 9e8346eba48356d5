"""Models of an objective: their inputs and outputs transformed, and acquisitions read from them."""
