"""Devices by their data sheets, and what a step takes on them: seconds and memory, on paper."""
