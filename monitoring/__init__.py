"""What a run tells the outside: the list of metrics and the exporter. Knows nothing of the trainer."""
