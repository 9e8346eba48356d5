"""What the evaluation of attributions needs: Captum's methods by name, a model left as it was, and a report."""
