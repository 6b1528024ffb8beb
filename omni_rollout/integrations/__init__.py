"""Ways to run the same loop on other people's machinery. Each is one folder, and the only place where its names appear."""
