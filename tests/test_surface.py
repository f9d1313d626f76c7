"""The public surface, pinned: a change here is a change to other people's code."""

import inspect

import multicard as mc
from multicard import errors

PUBLIC = {
    "DiffusionOutput",
    "DiffusionPipeline",
    "ParallelTransformerLayer",
    "ParallelTransformer",
    "ParallelMLP",
    "ParallelAttention",
    "Generation",
    "LLM",
    "parallelize",
    "ColumnParallelConv2d",
    "ColumnParallelConv3d",
    "RowParallelConv2d",
    "RowParallelConv3d",
    "VocabParallelEmbedding",
    "RowParallelLinear",
    "ParallelLMHead",
    "GatherLastDim",
    "ColumnParallelLinear",
    "Axis",
    "ParallelConfig",
    "Kept",
    "ParallelMesh",
    "Ranks",
    "launch",
    "attend",
    "attend_decode",
    "attention_forward",
    "errors",
    "from_pretrained",
    "gather_sequence",
    "init_mesh",
    "shard_sequence",
    "single",
}


def test_public_names_are_pinned():
    assert set(mc.__all__) == PUBLIC


def test_every_public_name_is_documented():
    undocumented = [name for name in PUBLIC if not inspect.getdoc(getattr(mc, name))]
    assert undocumented == []


def test_every_error_is_ours_and_in_the_tree():
    classes = [c for c in vars(errors).values() if inspect.isclass(c)]
    assert all(issubclass(c, errors.MulticardError) for c in classes)
    assert all(c.__name__ in errors.__doc__ for c in classes)


def test_errors_keep_their_attributes_when_pickled():
    import pickle

    error = errors.CollectiveTimeout("late", rank=2, collective="all_reduce", sequence_number=7)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.rank, copy.collective, copy.sequence_number, str(copy)) == (2, "all_reduce", 7, "late")
