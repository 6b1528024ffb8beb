"""The nano Wan2.2, "a digit that moves left or right": rendered videos -> a VAE and two experts -> an early state."""
