"""Labelled images: the sources they come from, and the views that training reads them through."""
