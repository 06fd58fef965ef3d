"""Gates that close: an adapter that is faster to serve."""
