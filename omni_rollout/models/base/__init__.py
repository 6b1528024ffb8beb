"""What every family shares: sampling parameters, the velocity, the denoising loop, policies of one or two experts."""
