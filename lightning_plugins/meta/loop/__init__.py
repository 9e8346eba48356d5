"""Parts of the inner loop: one episode, its evaluation, norms, batches of tasks and checks."""
