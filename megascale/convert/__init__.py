"""Models of other libraries in and out, and a checkpoint's model on one process."""
