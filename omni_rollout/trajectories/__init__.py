"""A trajectory as a file, on its way to one, and compared by digest."""
