"""The front door: public names, version, registration with the Auto classes, and what setup.cfg declares."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys

import pytest
from lower_bounds import lower_bounds
from packaging.requirements import Requirement
from pages import ROOT, SCRIPTS, SETTINGS

import eccl
from eccl.utils.shipped import TRAINING_HELP

PUBLIC_NAMES = {
    *("ECCLConfig", "ECCLModel", "ECCLProcessor", "ECCLTrainer", "ECCLTrainingArguments"),
    *("Gallery", "load_model", "load_adapter", "convert_checkpoint"),
}

HEAVY_PACKAGES = {
    *("torch", "transformers", "datasets", "peft", "accelerate", "huggingface_hub", "numpy", "PIL"),
    *("matplotlib", "gradio", "pyarrow", "pandas"),
}


def run_python(code: str, *words: str) -> str:
    """Runs code in a new process and returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def requirements(section: str, name: str) -> list[Requirement]:
    lines = SETTINGS[section][name].split("\n")
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_importing_the_package_loads_no_large_library():
    loaded = run_python("import sys, eccl; dir(eccl); eccl.__version__; print(*sys.modules)").split()
    assert not HEAVY_PACKAGES & set(loaded)
    assert [name for name in loaded if name.startswith("eccl.")] == []


TRAINING_HELP_ALONE = """
import runpy, sys
sys.argv = ["train_eccl", sys.argv[1]]
try:
    runpy.run_module("eccl.train_eccl", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
print(*sys.modules)
"""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_the_training_loads_no_large_library(flag):
    printed, _, loaded = run_python(TRAINING_HELP_ALONE, flag).rstrip("\n").rpartition("\n")
    assert printed.rstrip("\n") == TRAINING_HELP.read_text().rstrip("\n")
    assert not HEAVY_PACKAGES & set(loaded.split())


def test_the_training_loads_no_package_that_it_may_not_need():
    loaded = run_python("import sys, eccl.train_eccl; print(*sys.modules)").split()
    assert not {"matplotlib", "gradio", "pymilvus", "cv2", "onnx", "onnxruntime", "tensorboard", "trackio"} & set(
        loaded
    )


def test_every_public_name_is_imported_on_first_use():
    assert set(eccl.__all__) == {*PUBLIC_NAMES, "__version__"}
    assert set(eccl.__all__) <= set(dir(eccl))
    for name in PUBLIC_NAMES:
        value = getattr(eccl, name)
        assert value.__name__ == name and value.__module__ == f"eccl.{eccl._MODULES[name]}"
        assert name in importlib.import_module(value.__module__).__dict__
        assert name in vars(eccl)


def test_type_checkers_see_the_same_names():
    guarded = next(node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == eccl._MODULES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'eccl' has no attribute 'ECCLModle'"):
        eccl.ECCLModle  # noqa: B018
    with pytest.raises(ImportError, match="ECCLModle"):
        from eccl import ECCLModle  # noqa: F401


def test_the_version_is_that_of_setup_cfg(monkeypatch):
    assert eccl.__version__ == SETTINGS["metadata"]["version"]

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert eccl._read_version() == SETTINGS["metadata"]["version"]


AUTO_CLASSES = """
import sys, torch
from eccl import {name}
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
import eccl
folder = sys.argv[1]
for repetition in range(2):
    for trust in ({{}}, {{"trust_remote_code": True}}, {{"trust_remote_code": False}}):
        for auto in (AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor):
            module = type(auto.from_pretrained(folder, **trust)).__module__
            assert module.startswith("eccl."), (auto, trust, module)
    eccl._register()
model = AutoModel.from_pretrained(folder)
assert isinstance(model, eccl.ECCLModel) and isinstance(AutoModel.from_config(model.config), eccl.ECCLModel)
assert isinstance(AutoProcessor.from_pretrained(folder), eccl.ECCLProcessor)
"""


@pytest.mark.parametrize("name", ["ECCLConfig", "load_model"])
def test_a_public_name_registers_the_auto_classes(name, backbone):
    run_python(AUTO_CLASSES.format(name=name), backbone)


REMOTE_CODE = """
import sys
from eccl.modeling_eccl import ECCLModel
from transformers import AutoModel, AutoProcessor
folder = sys.argv[1]
remote = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(remote).__module__.startswith("transformers_modules."), type(remote).__module__
assert not isinstance(remote, ECCLModel)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
from eccl import ECCLModel as public
assert public is ECCLModel
local = AutoModel.from_pretrained(folder)
assert isinstance(local, ECCLModel)
for ours, theirs in zip(local.state_dict().values(), remote.state_dict().values(), strict=True):
    assert ours.equal(theirs)
"""


def test_without_a_public_name_the_code_of_the_checkpoint_is_used(backbone):
    run_python(REMOTE_CODE, backbone)


def test_every_package_is_declared():
    found = {path.parent.relative_to(ROOT).parts for room in ROOT.iterdir() for path in room.rglob("__init__.py")}
    found = {parts for parts in found if not parts[0].startswith(".") and parts[0] not in ("tests", "build", "demo")}
    declared = set(SETTINGS["options"]["packages"].split())
    assert declared == {"eccl", *(".".join(("eccl", *parts)) for parts in found)}


def test_every_data_file_is_declared_or_left_out_on_purpose():
    left_out = {"assets/synthetic-backbone", "docs", "tests", ".ci"}
    patterns = {
        (ROOT.joinpath(*package.split(".")[1:]), pattern)
        for package, lines in SETTINGS["options.package_data"].items()
        for pattern in lines.split()
    }
    shipped = {path for folder, pattern in patterns for path in folder.glob(pattern)}
    assert all(list(folder.glob(pattern)) for folder, pattern in patterns)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the list of files comes from git, and this is no clone")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix == ".py" or "/" not in name or any(path.is_relative_to(ROOT / folder) for folder in left_out):
            continue
        assert path in shipped, f"{name} is neither in package_data nor left out on purpose"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_console_script_has_its_command(script):
    module, _, function = SCRIPTS[script].partition(":")
    source = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    definitions = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert function == "main" and {"main", "make_parser"} <= set(definitions)


def test_the_constraints_pin_every_requirement_within_its_bounds():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("-", "_"): version for name, version in pins.items()}
    declared = requirements("options", "install_requires")
    declared += [part for extra in SETTINGS["options.extras_require"] for part in
                 requirements("options.extras_require", extra) if part.name != "eccl"]  # fmt: skip
    for requirement in declared:
        version = pins[requirement.name.lower().replace("-", "_")]
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt pins {version}"
    assert f"TORCH := torch=={pins['torch']}" in (ROOT / "Makefile").read_text()


def test_the_lowest_versions_are_those_of_setup_cfg():
    bounds = lower_bounds()
    declared = requirements("options", "install_requires")
    for extra in ("test", "describe", "search", "app", "video", "onnx", "sentence-transformers"):
        declared += requirements("options.extras_require", extra)
    assert bounds == {
        requirement.name: part.version
        for requirement in declared
        for part in requirement.specifier
        if part.operator == ">=" and requirement.name != "torch"
    }
