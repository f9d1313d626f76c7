"""Other people's models, split in place by plan."""
