"""A run folder as one HTML page: nothing from the network, no script."""
