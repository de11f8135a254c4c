"""Plans made ahead of time, by a process of their own."""
