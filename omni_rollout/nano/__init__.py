"""The nano Qwen-Image: the real architecture, small enough to train and to sample on two CPU cores.

`render` draws the training images, `vae` and `transformer` train on them, `build` runs all stages and writes a checkpoint in
diffusers layout, `random_weights` writes an untrained one of any size. Importing this package imports no torch.
"""
