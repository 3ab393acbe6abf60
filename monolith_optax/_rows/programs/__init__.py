"""Traced programs, and running them on some rows of their tables."""
