"""A run's life: where it goes on from, what it keeps, how it is stopped."""
