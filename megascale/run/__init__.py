"""What a run will be, before its first step: its start, its data, what stands in its way."""
