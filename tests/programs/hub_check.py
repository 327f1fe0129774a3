"""Trains, publishes to a Hub on the loopback, and loads everything by name elsewhere: `make hub-check`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import LoopbackHub

from helpers import ROOT

BACKBONE, MODEL, ADAPTER = "me/backbone", "me/eccl-tiny", "me/eccl-tiny-adapter"
DATA, METRIC = "me/tiny-pedes", "me/person_retrieval"

# Scores a model on a data set: by name with what the Hub gives alone, or here with this package.
SCORE = """
import json, sys
model_name, data, metric_name, blocked = sys.argv[1:]
if blocked == "alone":
    for name in ("eccl", "peft", "torchvision"):
        sys.modules[name] = None
else:
    import eccl.dataset_scripts
import datasets, evaluate, torch
from transformers import AutoModel, AutoProcessor, pipeline
if blocked == "alone":
    rows = datasets.load_dataset(data, split="test")
else:
    rows = datasets.load_dataset("synthetic_pedes", data_dir=data, split="test")
model = AutoModel.from_pretrained(model_name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=True)
captions = [caption for own in rows["captions"] for caption in own]
with torch.no_grad():
    texts = model.get_text_features(processor(text=captions, return_tensors="pt")["input_ids"])
    images = model.get_image_features(processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"])
query_ids = [person for person, own in zip(rows["person_id"], rows["captions"]) for _ in own]
figures = evaluate.load(metric_name).compute(
    predictions=texts, references=query_ids, gallery_embeds=images, gallery_person_ids=list(rows["person_id"])
)
search = pipeline("text-to-person-retrieval", model=model_name, trust_remote_code=True, device="cpu")
found = search.index(rows, progress=False)(captions[0], top_k=5)
print(json.dumps({"features": torch.cat([texts, images]).tolist(), "figures": figures, "captions": captions,
                  "found": [entry["path"] for entry in found]}))
"""
ATTACH = """
import json, sys, torch
from eccl.search.gallery import load_model
from eccl.hub.adapter import load_adapter
model = load_adapter(sys.argv[1]).eval()
_, processor = load_model(sys.argv[1])
captions = json.loads(sys.argv[2])
with torch.no_grad():
    texts = model.get_text_features(processor(text=captions, return_tensors="pt")["input_ids"])
print(json.dumps(texts.tolist()))
"""


def run(folder: Path, hub: LoopbackHub, *command: str) -> str:
    """Runs a command in a process of its own, with a cache of its own; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    home = tempfile.mkdtemp(dir=folder, prefix="home-")
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def check(folder: Path) -> list[tuple[str, float, float]]:
    """What was compared, the worst difference, and the most that it may be."""
    hub = LoopbackHub()
    try:
        return _check(folder, hub)
    finally:
        hub.close()


def _check(folder: Path, hub: LoopbackHub) -> list[tuple[str, float, float]]:
    sizes = ["--train_ids", "3", "--val_ids", "2", "--test_ids", "6", "--images_per_id", "2"]
    run(folder, hub, "-m", "eccl.dataset_scripts.synthetic", *sizes, "--output_dir", "data", "--num_workers", "1")
    run(folder, hub, "-m", "eccl.hub.publish", str(ROOT / "assets" / "synthetic-backbone"), BACKBONE)
    run(
        folder, hub, str(ROOT / "train_eccl.py"),
        *("--dataset_name", "synthetic_pedes", "--data_dir", "data", "--output_dir", "run", "--init_from", BACKBONE),
        *("--prompt_depth", "2", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "True"),
        *("--learning_rate", "0.01", "--push_to_hub", "True", "--hub_model_id", MODEL),
    )  # fmt: skip
    run(folder, hub, "-m", "eccl.hub.publish", "run/adapter", ADAPTER)
    export = ["-m", "eccl.dataset_scripts.export", "synthetic_pedes", "--data_dir", "data", "--output_dir", "parquet"]
    run(folder, hub, *export, "--push_to_hub", DATA)
    run(folder, hub, "-m", "eccl.hub.publish", str(ROOT / "eval" / "person_retrieval"), METRIC)

    here = json.loads(run(folder, hub, "-c", SCORE, str(folder / "run"), str(folder / "data"),
                          str(ROOT / "eval" / "person_retrieval"), "here").splitlines()[-1])  # fmt: skip
    alone = json.loads(run(folder, hub, "-c", SCORE, MODEL, DATA, METRIC, "alone").splitlines()[-1])
    captions = here["captions"]
    attached = json.loads(run(folder, hub, "-c", ATTACH, ADAPTER, json.dumps(captions)).splitlines()[-1])
    start = json.loads(run(folder, hub, "-c", ATTACH.replace("load_adapter(sys.argv[1])", "load_model(sys.argv[1])[0]"),
                           BACKBONE, json.dumps(captions)).splitlines()[-1])  # fmt: skip
    rows = [
        ("features by name, without this package", difference(alone["features"], here["features"]), 1e-6),
        ("features of the adapter by name, captions", difference(attached, here["features"][: len(captions)]), 1e-5),
        ("figures of the metric by name", max(abs(alone["figures"][k] - v) for k, v in here["figures"].items()), 0.0),
        ("captions of the data set by name that differ", float(alone["captions"] != captions), 0.0),
        ("results of the pipeline by name that differ", float(alone["found"] != here["found"]), 0.0),
        ("private data set left public", float(not hub.repositories["dataset", DATA]["private"]), 0.0),
    ]
    # Two steps changed the model: the comparison is not of a backbone with itself.
    if difference(start, here["features"][: len(captions)]) < 1e-3:
        raise RuntimeError("training did not change the features")
    return rows


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest, relative to the largest entry."""
    pairs = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = check(Path(folder))
    for name, worst, allowed in rows:
        print(f"{name:46} {worst:8.1e} (allowed {allowed:.0e}){'' if worst <= allowed else '  OUTSIDE'}")
    sys.exit(any(worst > allowed for _, worst, allowed in rows))


if __name__ == "__main__":
    main()
