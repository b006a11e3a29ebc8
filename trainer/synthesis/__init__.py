"""The synthetic driving world: a city, its traffic, an ego car with cameras and LiDAR, written as a nuScenes dataroot."""
