"""Terms of a training step: what the step computed, pooled and guarded, and gradients of terms of weights."""
