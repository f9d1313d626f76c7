"""Classifier-free guidance: the branches of a denoising step, computed by different ranks."""

from multicard.guidance.batch import BatchPlan
from multicard.guidance.branches import Branches, Denoiser
from multicard.guidance.lazy import unwrap
from multicard.guidance.step import Part

__all__ = ["BatchPlan", "Branches", "Denoiser", "Part", "unwrap"]
