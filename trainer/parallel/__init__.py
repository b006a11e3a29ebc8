"""How a module is sharded: the only place that wraps, casts or checkpoints activations."""
