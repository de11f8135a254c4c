"""Operators that make a larger model's checkpoint from smaller ones, a piece at a time."""
