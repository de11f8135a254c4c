"""What keeps a long run alive."""
