"""Installs the project as the README says, in a new environment outside the checkout, and uses it there.

The last line counts the checks: `N passed, N failed`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hub_server import LoopbackHub
from pages import ROOT, SCRIPTS, SETTINGS, read_blocks, shell_commands

BACKBONE = ROOT / "assets" / "synthetic-backbone"
PUBLIC_NAMES = """
import json, eccl
names = {name: getattr(eccl, name) for name in eccl.__all__}
print(json.dumps([eccl.__version__, eccl.__file__, sorted(names)]))
"""
SHIPPED_FILES = """
from pathlib import Path
import eccl
from eccl.eval.reports import published_rows
from eccl.utils.shipped import clip_tokenizer, find_recipe, shipped_backbone
assert (Path(eccl.__file__).parent / "py.typed").is_file()
assert len(clip_tokenizer()) == 49408
assert published_rows("rstpreid")
for recipe in ("eccl_cuhk_pedes", "eccl_icfg_pedes", "eccl_rstpreid", "demo", "accelerate/one_gpu"):
    find_recipe(recipe)
try:
    shipped_backbone()
except FileNotFoundError as error:
    assert "synthetic-backbone" in str(error)
else:
    raise AssertionError("the backbone must not be in the wheel")
"""
USE_METRIC = """
import evaluate
metric = evaluate.load("me/person_retrieval")
# Rows of similarities: the first query ranks its image first, the second query ranks its image second.
figures = metric.compute(predictions=[[0.9, 0.1], [0.8, 0.2]], references=[7, 8], gallery_person_ids=[7, 8])
assert figures["rank1"] == 50.0, figures
"""


class WheelCheck:
    """A new environment with the installed project.

    Args:
        folder: an empty folder outside the checkout; it gets a copy of the checkout, the environment and a work folder.
    """

    def __init__(self, folder: Path):
        self.checkout, self.environment, self.work = folder / "checkout", folder / "environment", folder / "work"
        self.bin = self.environment / "bin"
        self.work.mkdir()
        self.variables = os.environ | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
        }
        self.variables.pop("PYTHONPATH", None)

    def run(self, *words: str | Path, folder: Path | None = None, **variables: str) -> str:
        """Runs a command of the new environment and returns what it printed on stdout.

        Raises:
            RuntimeError: the command failed; the message ends with its stderr.
        """
        words = [str(self.bin / words[0]), *map(str, words[1:])]
        done = subprocess.run(
            words, cwd=folder or self.work, env=self.variables | variables, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)[:300]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def copy_checkout(self) -> None:
        """Copies the files that git would commit: files of an earlier build must not get into the wheel."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            source, target = ROOT / name, self.checkout / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def install(self, section: str) -> None:
        """Runs the `pip` commands in a section of the README, in the copy of the checkout."""
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.environment], check=True)
        for block in read_blocks(ROOT / "README.md"):
            if block.section == section and block.language == "sh":
                for words in shell_commands(block):
                    if words[0] == "pip":
                        self.run("pip", words[1], "--quiet", *words[2:], folder=self.checkout)

    def import_public_names(self) -> None:
        version, file, names = json.loads(self.run("python", "-c", PUBLIC_NAMES))
        assert version == SETTINGS["metadata"]["version"], version
        assert Path(file).is_relative_to(self.environment), file
        assert "ECCLModel" in names and "load_model" in names, names

    def use_shipped_files(self) -> None:
        self.run("python", "-c", SHIPPED_FILES)

    def show_help(self) -> None:
        """Asks every command for `--help`, by its script and by its module."""
        for script, entry in SCRIPTS.items():
            module = entry.removesuffix(":main").removesuffix(".__main__")
            assert "usage: " in self.run(script, "--help"), script
            assert "usage: " in self.run("python", "-m", module, "--help"), module

    def search(self) -> None:
        """Draws a few persons and searches them with the backbone of the checkout."""
        sizes = ("--train_ids", "2", "--val_ids", "2", "--test_ids", "4", "--images_per_id", "2", "--num_workers", "1")
        self.run("eccl-synthetic", *sizes, "--output_dir", "data")
        query = ("--images", "data/imgs", "--query", "a woman in a red coat", "--top_k", "3", "--output", "found.png")
        printed = self.run("eccl-gallery", "--model", BACKBONE, *query)
        assert "among 16 images" in printed and printed.count("data/imgs/") == 3, printed
        assert (self.work / "found.png").is_file()

    def train(self) -> None:
        """Starts the training command as a module, and trains one step with a recipe that is found by name."""
        launch = ("accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
        launch += ("--dynamo_backend", "no", "-m", "eccl.train_eccl")
        assert "--data_dir" in self.run(*launch, "--help")
        data = ("--data_dir", "data", "--output_dir", "out", "--init_from", BACKBONE)
        self.run(*launch, "demo", *data, "--max_steps", "1", "--per_device_train_batch_size", "4")
        assert (self.work / "out" / "model.safetensors").is_file()

    def publish_metric(self) -> None:
        """Publishes the installed metric to a Hub on this machine and loads it from there by name."""
        code = "import eccl.eval.person_retrieval as module; print(module.__path__[0])"
        folder = self.run("python", "-c", code).strip()
        hub = LoopbackHub()
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
        try:
            self.run("eccl-publish", folder, "me/person_retrieval", **online)
            assert {"README.md", "person_retrieval.py"} <= set(hub.files("space", "me/person_retrieval"))
            self.run("python", "-c", USE_METRIC, **online)
        finally:
            hub.close()


def report(name: str, check: Callable[[], None]) -> bool:
    """Runs a check, prints its name, result and time, and returns whether it passed."""
    start = time.monotonic()
    try:
        check()
        passed, problem = True, ""
    except Exception as error:
        passed, problem = False, f"\n{type(error).__name__}: {error}"
    print(f"{'ok' if passed else 'FAILED':6} {name} ({time.monotonic() - start:.0f} s){problem}", flush=True)
    return passed


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        check = WheelCheck(Path(folder))
        checks = {
            "the checkout is copied": check.copy_checkout,
            "the repository is installed as the README says": lambda: check.install("From the repository"),
            "the public names of that installation": check.import_public_names,
            "a wheel is built and installed as the README says": lambda: check.install("From a wheel"),
            "the public names of the wheel": check.import_public_names,
            "recipes, published figures, tokenizer and py.typed": check.use_shipped_files,
            "--help of every command": check.show_help,
            "a search with the shipped backbone": check.search,
            "training with a recipe found by name": check.train,
            "the installed metric, published and loaded": check.publish_metric,
        }
        results = [report(name, function) for name, function in checks.items()]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
