"""Demonstrations on the miniature world."""
