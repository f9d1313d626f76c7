"""What ranks print: whole lines, and no trouble with where they go ends a job."""

import io

import pytest

from multicard.errors import ConfigError
from multicard.ranks.logs import Logs


def test_lines_go_to_the_console_and_to_files(tmp_path, capsys):
    logs = Logs(range(2), tmp_path / "new", "rank0")
    logs.write(0, False, "out")
    logs.write(0, True, "err")
    logs.write(1, False, "other")
    logs.close()
    logs = Logs(range(2), tmp_path / "new", "none", mode="a")
    logs.write(1, False, "after a restart")
    logs.close()
    assert capsys.readouterr() == ("[0] out\n", "[0] err\n")
    assert [(tmp_path / "new" / f"rank{rank}.log").read_text() for rank in range(2)] == [
        "out\nerr\n",
        "other\nafter a restart\n",
    ]


@pytest.mark.parametrize("console", [None, io.StringIO(), object()])
def test_a_console_that_takes_nothing_is_no_reason_to_end(console, monkeypatch):
    if isinstance(console, io.StringIO):
        console.close()
    monkeypatch.setattr("sys.stdout", console)
    Logs(range(1)).write(0, False, "line")


def test_a_full_disk_is_no_reason_to_end(tmp_path, capsys):
    logs = Logs(range(1), tmp_path)
    logs._files[0].close()
    logs._files[0] = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    logs.write(0, False, "line")
    logs.close()
    assert capsys.readouterr().out == "[0] line\n"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="log_dir="):
        Logs(range(2), tmp_path / "file")
