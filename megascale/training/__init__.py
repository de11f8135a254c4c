"""The run: what it will do (`describe`), one step, the loop, evaluation."""
