"""The imports between the files, read from their syntax trees (DESIGN: who may import whom)."""

import ast
import sys

import pytest

from helpers import ROOT

HUB_FILES = {"configuration_eccl", "modeling_eccl", "processing_eccl", "pipeline_eccl"}
# Beside the standard library: packages, and files of this project.
ALLOWED = {
    "configuration_eccl": {"transformers", "huggingface_hub"},
    "modeling_eccl": {"torch", "transformers", "huggingface_hub", ".configuration_eccl"},
    "processing_eccl": {"transformers", "numpy", "PIL", ".configuration_eccl"},
    "pipeline_eccl": {"torch", "transformers", "PIL"},
    "losses_eccl": {"torch"},
    "memory_eccl": {"torch", ".losses_eccl"},
    "checkpoints_eccl": {"accelerate", "transformers"},
    "monitor_eccl": {"torch"},
    "training_arguments_eccl": {"torch", "accelerate", "transformers"},
    "lora_eccl": {"peft", ".configuration_eccl", ".modeling_eccl"},
    "convert_eccl": {
        *{"torch", "transformers", "huggingface_hub", "peft"},
        *{".configuration_eccl", ".data_eccl", ".lora_eccl", ".modeling_eccl", ".processing_eccl"},
        *{".model_card_eccl", ".publish_eccl"},
    },
}


def imports_of(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").split(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("name", ALLOWED)
def test_files_import_only_what_they_may(name):
    assert imports_of(ROOT / f"{name}.py") <= ALLOWED[name]


def test_nothing_imports_the_training_script():
    sources = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "tests" not in path.parts]
    assert len(sources) > 15
    for path in sources:
        assert not any("train_eccl" in name for name in imports_of(path)), path


def test_nothing_evaluates_text_or_unpickles():
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec") and not name.startswith("pickle."), path
            if name == "torch.load":
                assert any(word.arg == "weights_only" and word.value.value is True for word in node.keywords), path
