"""The decoder that :class:`multicard.LLM` runs, made of parallel layers."""
