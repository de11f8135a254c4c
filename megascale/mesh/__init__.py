"""How a plan runs on the ranks: packing, attention over packed sequences."""
