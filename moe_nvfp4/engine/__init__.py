"""Many requests at once: pages, scheduling, and the loop that joins them to a model."""
