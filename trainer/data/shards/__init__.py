"""Packed data sets: shards of a store and their index, from writing to reading."""
