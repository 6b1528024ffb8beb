"""Qwen-Image-Layered: a picture into layers with alpha, under a text that describes it."""
