"""A procedural driving world: city, traffic, ego, cameras and LiDAR, written as a nuScenes dataroot with full ground truth."""
