"""What could stop a run, looked at before it begins: `machine`, `storage` and `collectives` find, `examine` asks them on all ranks."""
