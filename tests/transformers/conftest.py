"""Every architecture of the zoo, measured once a mesh: the tests look results up."""

import importlib.util
import pathlib
import sys

import cloudpickle
import pytest

import multicard as mc


def _load(name):
    """A helper beside this file, which travels to the ranks by value."""
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


zoo = _load("zoo")


@pytest.fixture(scope="session")
def oracles():
    """``{name: (logits, tokens)}`` of one process."""
    found = {}
    for name in (*zoo.DECODERS, *zoo.ENCODERS):
        model = zoo.build(name)
        found[name] = zoo.forward(model, name), zoo.tokens(model, name) if name in zoo.DECODERS else None
    return found


@pytest.fixture(scope="session")
def measured(pools, oracles):
    """``measured(**degrees)``: by architecture and rank (error, tokens equal, share of parameters) or a refusal."""
    done = {}

    def get(**degrees):
        config = mc.ParallelConfig(**degrees)
        if config not in done:
            ranks = pools(config.world_size, "auto").run(zoo.on_mesh, config, zoo.measure, oracles)
            done[config] = {name: [rank[name] for rank in ranks] for name in oracles}
        return done[config]

    return get
