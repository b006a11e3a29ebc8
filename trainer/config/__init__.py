"""A run as one frozen pydantic object; imports no torch, so a bad file fails at once and on a laptop."""
