"""``diffusers`` models and pipelines split over a mesh in place; the pipeline's code isn't changed."""

from multicard.guidance import BatchPlan
from multicard.integrations.diffusers.families import SequencePlan
from multicard.integrations.diffusers.parallelize import parallelize
from multicard.integrations.diffusers.reports import ComponentReport, report

__all__ = ["BatchPlan", "ComponentReport", "SequencePlan", "parallelize", "report"]
