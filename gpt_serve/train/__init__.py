"""Fit one adapter: data, recipes, the training loop and the model card."""
