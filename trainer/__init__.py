"""The trainer: everything around the model, from the config of a run to its last checkpoint."""
