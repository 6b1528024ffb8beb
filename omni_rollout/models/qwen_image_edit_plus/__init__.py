"""Qwen-Image-Edit-Plus (2509, 2511): several pictures and what to make of them."""
