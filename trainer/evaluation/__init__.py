"""Downstream tasks on a saved encoder: how each is trained and scored, and what came out."""
