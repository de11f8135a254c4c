"""What a run measures and says: metrics, trackers, console, events, profiles and plots."""
