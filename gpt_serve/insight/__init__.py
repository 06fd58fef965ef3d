"""Looking inside: gates, attention, what a block still knows of an image."""
