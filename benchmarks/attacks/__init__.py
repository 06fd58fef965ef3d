"""What strangers can do to a server, and what an honest client notices of it: ``python -m benchmarks.attacks``."""
