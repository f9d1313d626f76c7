"""``transformers`` models split over a mesh in place, by plan; they keep their own ``generate()``."""

from multicard.integrations.transformers.parallelize import from_pretrained, load_model, parallelize

__all__ = ["from_pretrained", "load_model", "parallelize"]
