"""The names and shapes under which others publish plain ViTs, and the way between them and our encoder: tensors in, tensors out."""
