"""Checkpoints as logical state: written in shards, committed by a manifest, read under any engine."""
