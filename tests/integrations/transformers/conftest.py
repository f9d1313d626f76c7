"""Every architecture of the zoo, measured once a mesh: the tests look results up."""

import cloudpickle
import pytest

import multicard as mc
import zoo

cloudpickle.register_pickle_by_value(zoo)


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
