"""Wan2.2: image to video. The first frame is given."""
