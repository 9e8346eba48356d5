"""Parameters swapped while a Trainer trains them: optimizers, schedulers and DDP follow."""
