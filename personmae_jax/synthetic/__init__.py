"""Rendered pedestrians with identity and camera, by numpy and OpenCV."""
