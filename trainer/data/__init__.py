"""From a dataroot to batches: index, clips, pairs, decode, order, loader."""
