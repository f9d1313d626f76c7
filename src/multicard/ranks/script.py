"""Running a script on every rank of a mesh, for ``multicard run``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from multicard.errors import ConfigError
from multicard.ranks.children import Children
from multicard.ranks.patience import EXIT_GRACE, SCRIPT_OTHERS
from multicard.ranks.settings import Settings


def run_script(path: str, args: Sequence[str], settings: Settings) -> None:
    """Run the file as ``__main__`` on this host's ranks of the mesh; inside it, ``init_mesh`` joins.

    Raises:
        ConfigError: there is no such file, or the mesh doesn't divide over the hosts.
        the errors of :func:`multicard.launch`.
    """
    _check(path, settings)
    children = Children(settings, SCRIPT_OTHERS)
    done = False
    try:
        children.start()
        children.call("script", (os.path.abspath(path), list(args)), label=os.path.basename(path))
        children.meet_hosts()
        done = True
    finally:
        children.end("the script has ended", EXIT_GRACE if done else 0.0)


def _check(path: str, settings: Settings) -> None:
    if not os.path.isfile(path):
        raise ConfigError(f"no such file: {path}")
    hosts, size = settings.hosts, settings.config.world_size
    if not 0 <= hosts.index < hosts.count:
        raise ConfigError(f"host number {hosts.index} of {hosts.count}: hosts count from 0")
    if size % hosts.count:
        raise ConfigError(f"{size} ranks ({settings.config}) don't divide over {hosts.count} hosts")
    if hosts.count > 1 and not hosts.port:
        raise ConfigError("several hosts need --master-port: a port that is free on host 0, the same on every host")
    if hosts.count > 1 and hosts.address.startswith(("127.", "localhost")):
        raise ConfigError(f"several hosts need --master-addr: {hosts.address} is a different machine on each host")
