"""Hyperparameters: schedules, the paper's table, and which recipe a run takes."""
