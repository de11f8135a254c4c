"""A cluster on paper: devices, distributions of lengths, and steps replayed on them."""
