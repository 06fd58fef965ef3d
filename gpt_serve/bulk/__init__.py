"""Predictions for folders and tables of images: streamed, resumable, each image exactly once."""
