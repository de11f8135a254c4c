"""What a run will be, before its first step: where it starts, what it reads, what stands in its way."""
