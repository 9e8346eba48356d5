"""Published representation, weight and meta-learning methods for Lightning training loops.

Importing this package loads nothing else, not even torch. Its contents are in the subpackages:

* ``lightning_plugins.callbacks``: add one to a ``Trainer``;
* ``lightning_plugins.mixins``: for modules with custom steps;
* ``lightning_plugins.regularizers``: loss terms, as ``nn.Module``;
* ``lightning_plugins.metrics``: torchmetrics metrics;
* ``lightning_plugins.functional``: the mathematics, tensors in and tensors out.
"""

__version__ = "0.1.0"
