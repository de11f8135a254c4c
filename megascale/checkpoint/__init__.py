"""Saving in two stages, verifying, and loading into any layout, without running pickled code."""
