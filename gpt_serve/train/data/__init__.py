"""Labelled images: where they come from, and as what training reads them."""
