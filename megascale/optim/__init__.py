"""Optimizers, and their learning rate as a pure function of the tokens seen."""
