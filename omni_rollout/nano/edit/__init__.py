"""The nano Qwen-Image-Edit, "recolour the number": rendered pairs -> the nano transformer trained on -> an early state."""
