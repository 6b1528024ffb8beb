"""The nano Qwen-Image-Layered, "a number off its background": rendered layers -> nano's parts trained on -> an early state."""
