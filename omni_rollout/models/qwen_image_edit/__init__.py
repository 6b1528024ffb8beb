"""Qwen-Image-Edit: a picture and what to change in it."""
