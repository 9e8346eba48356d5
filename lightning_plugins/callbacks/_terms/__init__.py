"""Terms of a training step: the wrapped step, what it logs and guards, teachers, and gradients of weight terms."""
