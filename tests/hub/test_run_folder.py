import pytest

from eccl.hub.run_folder import RECORD_FILE, TRAINING_LOG, claim_run_folder, is_finished


def claim(path, checkpoints=False, resumes=False, overwrite=False):
    return claim_run_folder(path, checkpoints, resumes, overwrite)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finish(path):
    """Does what a run does: it starts, writes its files, and finishes."""
    with claim(path) as folder:
        folder.start()
        for name in ("checkpoint-4", "adapter", "runs"):
            (path / name).mkdir()
        with folder.finishing():
            assert is_finished(path) is False
            for name in ("config.json", "model.safetensors", "README.md", TRAINING_LOG, "adapter/config.json"):
                (path / name).write_text("first")
    assert is_finished(path)


# What a user may have put into the folder of a run.
OTHERS = ("notes.txt", "LICENSE", "vocab.json", "checkpoint-backup", "checkpoint-notes.txt", "runs", "adapter-old")


def add_others(path):
    for name in OTHERS:
        if "." in name or name == "LICENSE":
            (path / name).write_text("mine")
        else:
            (path / name).mkdir(exist_ok=True)


def test_a_run_writes_to_a_new_or_empty_folder_and_to_one_with_logs(tmp_path):
    with claim(tmp_path / "new") as folder:
        assert names(folder.path) == [".lock"]
    assert names(tmp_path) == []
    for name in ("train.log", "slurm-12.out", ".gitkeep"):
        (tmp_path / name).write_text("x")
    with claim(tmp_path) as folder:
        folder.start()
    assert names(tmp_path) == [".gitkeep", RECORD_FILE, "slurm-12.out", "train.log"]


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "checkpoint-4", "data"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused(name, overwrite, tmp_path):
    (tmp_path / name).write_text("x")
    with (
        pytest.raises(FileExistsError, match=rf"files that no training run wrote \({name}\)"),
        claim(tmp_path, overwrite=overwrite),
    ):
        pass
    assert names(tmp_path) == [name]


def test_a_finished_run_is_replaced_only_on_request_and_other_files_stay(tmp_path):
    finish(tmp_path)
    add_others(tmp_path)
    before = names(tmp_path)
    with (
        pytest.raises(FileExistsError, match=r"has a finished run: continue it with --resume_from_checkpoint True"),
        claim(tmp_path),
    ):
        pass
    # Without a checkpoint there is nothing to continue from, and the model would be trained anew.
    with pytest.raises(FileExistsError, match="has a finished run without a complete"), claim(tmp_path, resumes=True):
        pass
    with claim(tmp_path, checkpoints=True, resumes=True) as folder:
        folder.start()
    assert names(tmp_path) == before and is_finished(tmp_path)
    with claim(tmp_path, overwrite=True) as folder:
        # Until the run starts, a mistake in its data loses nothing.
        assert names(tmp_path) == [".lock", *before]
        folder.start()
        assert names(tmp_path) == sorted([".lock", RECORD_FILE, *OTHERS])
    # This run has written nothing yet, so the next one needs no permission.
    with claim(tmp_path):
        pass


def test_checkpoints_of_a_run_that_was_stopped_are_kept(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(FileExistsError, match="has checkpoints of a run"), claim(tmp_path, checkpoints=True):
        pass
    with claim(tmp_path, checkpoints=True, resumes=True) as folder:
        folder.start()
    assert "checkpoint-4" in names(tmp_path) and is_finished(tmp_path) is False


def test_a_link_in_the_folder_is_removed_and_not_what_it_leads_to(tmp_path):
    finish(tmp_path / "run")
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    for name in ("checkpoint-8", "adapter"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with claim(tmp_path / "run", overwrite=True) as folder:
        folder.start()
    assert names(tmp_path / "elsewhere") == ["config.json"]
    assert not {"checkpoint-8", "adapter"} & {*names(tmp_path / "run")}


def test_a_damaged_record_is_named(tmp_path):
    for content, message in (("[1]", "holds a list"), ("{}", "is not the record of a run")):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"{RECORD_FILE} {message}"), claim(tmp_path):
            pass


def test_while_a_finished_model_is_replaced_the_run_counts_as_unfinished(tmp_path):
    finish(tmp_path)
    with claim(tmp_path, checkpoints=True, resumes=True) as folder:
        folder.start()
        with pytest.raises(KeyboardInterrupt), folder.finishing():
            assert is_finished(tmp_path) is False
            raise KeyboardInterrupt
    assert is_finished(tmp_path) is False
