"""Pre-training objectives: what one is (`base.py`), and one paper a file."""
