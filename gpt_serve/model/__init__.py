"""The frozen backbone and the prompted forward pass."""
