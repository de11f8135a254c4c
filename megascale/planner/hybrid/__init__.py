"""The default planner: rings of any size, chosen by time as well as by memory. NumPy only."""
