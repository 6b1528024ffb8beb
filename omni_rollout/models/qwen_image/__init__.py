"""Qwen-Image: text to image."""
