"""The inner loop taken apart: one episode, its measurements, norms, batches of tasks and checks."""
