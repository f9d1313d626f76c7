"""Models of other libraries, split in place by plan."""
