import json
import shutil

import fidelity
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import GOLDENS, ROOT


@pytest.fixture(scope="module")
def rows():
    goldens = fidelity.Goldens()
    return {check: list(check(goldens)) for check in fidelity.CHECKS}


@pytest.mark.parametrize("check", fidelity.CHECKS, ids=lambda check: check.__name__)
def test_all_quantities_agree_with_the_published_code(check, rows):
    assert rows[check]
    assert [row for row in rows[check] if not row.difference <= row.tolerance] == []


def is_reference(name):
    """Whether a tensor of the goldens is a result; the others are inputs."""
    results = ("grad0.", "loss_log", "lr_log", "memory_", "clip_init.", "irra_init.", "trained.")
    results += ("image_features", "text_features", "mlm_scores")
    return name.startswith(results) or name.endswith((".loss", ".rows_after")) or ".grad_" in name


def test_a_small_difference_is_noticed(tmp_path):
    """If a reference changes by a thousandth, its row must be outside the tolerance."""
    folder = tmp_path / "goldens"
    shutil.copytree(GOLDENS, folder)
    for name in ("train", "losses", "irra/train"):
        tensors = load_file(folder / f"{name}.safetensors")
        moved = {key: value * 1.001 if is_reference(key) else value for key, value in tensors.items()}
        save_file(moved, folder / f"{name}.safetensors")
    settings = json.loads((folder / "golden.json").read_text())
    settings["schedule_60_epochs"][30][0] *= 1.001
    settings["metrics"]["1.t2i"]["mAP"] *= 1.001
    settings["metrics"]["2.i2t"]["mINP"] *= 1.001
    (folder / "golden.json").write_text(json.dumps(settings))
    irra = json.loads((folder / "irra" / "golden.json").read_text())
    groups = irra["parameter_groups"]
    groups["lr 5e-03 wd 0e+00"].append(groups["lr 2e-03 wd 0e+00"].pop())
    (folder / "irra" / "golden.json").write_text(json.dumps(irra))
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["ids"][3][2] += 1
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    moved = fidelity.Goldens(folder)
    for check in fidelity.CHECKS:
        for row in check(moved):
            # These rows compare with zero, or not with a reference in the folder.
            unchanged = (
                row.quantity in ("weights without LoRA", "gradients of step 0, LoRA A") or "pixels" in row.quantity
            )
            assert unchanged or row.difference > row.tolerance, row


def test_nan_is_an_infinite_difference():
    assert fidelity.relative_difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_the_table_in_the_docs_has_the_printed_rows(rows):
    table = (ROOT / "docs" / "fidelity.md").read_text().splitlines()
    documented = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table if line.startswith("| ")]
    printed = [(row.quantity, row.compared_on) for check in fidelity.CHECKS for row in rows[check]]
    assert documented[1:] == printed
