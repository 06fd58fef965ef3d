"""An adapter, its file, and the store of adapters."""
