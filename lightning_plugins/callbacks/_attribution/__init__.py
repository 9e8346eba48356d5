"""Parts of the evaluation of attributions: Captum's methods by name, a model left as it was, and a report."""
