"""Wan2.2: text to video, by two experts."""
