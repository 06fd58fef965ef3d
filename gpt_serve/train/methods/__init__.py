"""What is trained: the published methods, and how each starts."""
