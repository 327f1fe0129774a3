import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from eccl.utils.files import (
    complete_file,
    complete_folder,
    locked_folder,
    require_absent,
    require_new_folder,
    require_no_input,
    require_picture_path,
    require_writable_folder,
)


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_under_its_name_when_the_block_ends(tmp_path):
    with complete_folder(tmp_path / "new" / "model") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "new" / "model").exists()
        # The temporary folder is on the same disk, so that it can be renamed.
        assert folder.is_relative_to(tmp_path / "new")
    assert names_below(tmp_path) == ["new", "new/model", "new/model/config.json"]


def test_a_complete_folder_may_replace_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    with complete_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert names_below(tmp_path) == ["model", "model/config.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_folder_appears_after_an_error(tmp_path, error):
    with pytest.raises(error), complete_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise error
    assert names_below(tmp_path) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(OSError), complete_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert names_below(tmp_path) == ["model", "model/weights"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_file_appears_under_its_name_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "picture.png"
    with complete_file(path) as temporary:
        # Pillow chooses the format by the suffix of the temporary name.
        Image.new("RGB", (3, 5)).save(temporary)
        assert not path.exists() and temporary.parent == path.parent
    assert names_below(tmp_path) == ["new", "new/picture.png"]
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_a_file_is_as_it_was(tmp_path, error):
    for old in (None, "old"):
        path = tmp_path / "results.json"
        if old:
            path.write_text(old)
        with pytest.raises(error), complete_file(path) as temporary:
            temporary.write_text("half of the new te")
            raise error
        assert names_below(tmp_path) == (["results.json"] if old else [])
        assert not old or path.read_text() == old


def test_a_complete_file_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "neighbour").touch()
    with complete_file(tmp_path / "features.safetensors") as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert (tmp_path / "features.safetensors").stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def test_a_complete_file_replaces_the_old_one(tmp_path):
    (tmp_path / "results.json").write_text("old")
    with complete_file(tmp_path / "results.json") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "results.json").read_text() == "old"
    assert (tmp_path / "results.json").read_text() == "new"


def test_only_a_missing_or_an_empty_folder_is_new(tmp_path):
    require_new_folder(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    require_new_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(FileExistsError, match=f"{path.name} exists and is not an empty folder"):
            require_new_folder(path)
    assert names_below(tmp_path) == ["empty", "file"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new" / "newer", tmp_path.relative_to(tmp_path), tmp_path / "new"):
        require_writable_folder(path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            require_writable_folder(path)
    # The superuser may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        require_writable_folder(tmp_path / "new")
    assert names_below(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "new/a.webp"])
def test_a_picture_can_be_written_with_a_suffix_of_pillow(tmp_path, name):
    require_picture_path(tmp_path / name)
    assert names_below(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.txt", ValueError, "a.txt does not end like a picture file"),
        ("a", ValueError, "a does not end like a picture file"),
        # Pillow reads this format and does not write it.
        ("a.psd", ValueError, "a.psd does not end like a picture file"),
        ("folder.png", IsADirectoryError, "folder.png is a folder"),
        ("file/a.png", NotADirectoryError, "file is a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, error, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        require_picture_path(tmp_path / name)


# -- Two processes, and processes that are killed

HOLD = """
import sys, time
from pathlib import Path
from eccl.utils import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as place:
    if place and place.is_dir():
        (place / "part").write_text("half")
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Starts a process that is within a block of one of the functions, and does not leave it."""
    processes = []

    def start(function, path):
        command = [sys.executable, "-c", HOLD, function, str(path)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "inside\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("function", ["locked_folder", "complete_folder"])
def test_two_processes_cannot_write_to_one_folder_and_a_killed_one_leaves_nothing(function, hold, tmp_path):
    path = tmp_path / "new" / "out"
    first = hold(function, path)
    write = {"locked_folder": locked_folder, "complete_folder": complete_folder}[function]
    with (
        pytest.raises(BlockingIOError, match=rf"another run is writing to {path} \(process {first.pid} on "),
        write(path),
    ):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with write(path) as folder:
        # What the killed process had written has gone.
        assert folder is None or not any(folder.iterdir())
        (folder or path).joinpath("whole").write_text("")
    assert names_below(tmp_path) == ["new", "new/out", "new/out/whole"]


def test_a_lock_is_not_inherited_by_worker_processes(tmp_path):
    """A data worker can outlive a process that was killed. Its lock must not."""
    with locked_folder(tmp_path):
        worker = os.fork()
        if not worker:
            time.sleep(600)
        os.close(os.open(tmp_path / ".lock", os.O_RDWR))  # This releases the lock of this process, like its death.
    try:
        subprocess.run(
            [sys.executable, "-c", HOLD.replace("time.sleep(600)", ""), "locked_folder", str(tmp_path)], check=True
        )
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_disk_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with complete_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert names_below(tmp_path) == ["out", "out/whole"] and "has no locks" in caplog.text


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError), locked_folder(tmp_path / "a" / "b"):
        raise ValueError
    assert names_below(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with locked_folder(tmp_path / "mine"):
        pass
    assert names_below(tmp_path) == ["mine"]


def test_the_files_of_killed_processes_are_removed_and_those_of_running_ones_are_not(hold, tmp_path):
    (running, killed) = (hold("complete_file", tmp_path / "a.png") for _ in range(2))
    killed.kill()
    killed.wait()
    other = tmp_path / f".a-{platform.node()}-x{killed.pid}.png"
    other.touch()
    with complete_file(tmp_path / "a.png") as unfinished:
        unfinished.write_text("whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.png", other.name, f".a-{platform.node()}-{running.pid}.png"}


# -- What is read is not overwritten


@pytest.mark.parametrize(
    "output, refused",
    [
        ("model", True),
        ("link", True),
        ("model/../model", True),
        (".", True),
        ("new", False),
        ("model/new", False),
        ("model/config.json", True),
        ("model/new.png", False),
        ("other", False),
    ],
)
def test_an_output_that_would_overwrite_an_input_is_refused(output, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    inputs = {"--init_from": "model", "--data_dir": None, "--base": "openai/clip-vit-base-patch16"}
    if refused:
        with pytest.raises(ValueError, match=r"where --init_from \(model\) would be overwritten: name another place"):
            require_no_input(tmp_path / output, inputs)
    else:
        require_no_input(tmp_path / output, inputs)
    # A command that only adds files may write above its inputs, and not into one of them.
    if output == ".":
        require_no_input(tmp_path / output, inputs, may_contain_inputs=True)
    elif output == "model":
        with pytest.raises(ValueError, match="would be overwritten"):
            require_no_input(tmp_path / output, inputs, may_contain_inputs=True)


def test_a_file_that_exists_is_replaced_only_on_request(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    require_absent([tmp_path / "results.md"], overwrite=False)
    require_absent([tmp_path / "results.json"], overwrite=True)
    with pytest.raises(FileExistsError, match=r"results.json exists: give --overwrite to replace it"):
        require_absent([tmp_path / "results.md", tmp_path / "results.json"], overwrite=False)
