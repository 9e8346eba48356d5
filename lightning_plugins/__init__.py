"""Published representation, weight and meta-learning methods for Lightning training loops.

The import of this package alone loads nothing else, not even torch. What it offers stands in its subpackages:

* ``lightning_plugins.callbacks``: add one to a ``Trainer``;
* ``lightning_plugins.mixins``: for modules that write their own steps;
* ``lightning_plugins.regularizers``: terms of a loss, as ``nn.Module``;
* ``lightning_plugins.metrics``: torchmetrics metrics;
* ``lightning_plugins.functional``: the mathematics, tensors in and tensors out.
"""

__version__ = "0.1.0"
