"""What the HTTP side costs, and how it grows with the number of its processes: ``python -m benchmarks.http``."""
