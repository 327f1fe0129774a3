"""Trains a model, publishes it to a Hub on this machine, and loads everything by name: `make hub-check`."""

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

# Scores a model on a data set. With "alone" everything comes from the Hub by name, and this package cannot be imported;
# with "here" the names are local folders, and this package loads the data set.
SCORE = """
import json, sys
model_name, data, metric_name, mode = sys.argv[1:]
if mode == "alone":
    for name in ("eccl", "peft", "torchvision"):
        sys.modules[name] = None
else:
    import eccl.dataset_scripts
import datasets, evaluate, torch
from transformers import AutoModel, AutoProcessor, pipeline
if mode == "alone":
    dataset = datasets.load_dataset(data, split="test")
else:
    dataset = datasets.load_dataset("synthetic_pedes", data_dir=data, split="test")
model = AutoModel.from_pretrained(model_name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=True)
captions = [caption for captions_of_image in dataset["captions"] for caption in captions_of_image]
with torch.no_grad():
    texts = model.get_text_features(processor(text=captions, return_tensors="pt")["input_ids"]).pooler_output
    pixels = processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]
    images = model.get_image_features(pixels).pooler_output
counts = [len(captions_of_image) for captions_of_image in dataset["captions"]]
query_ids = [person for person, count in zip(dataset["person_id"], counts) for _ in range(count)]
figures = evaluate.load(metric_name).compute(
    predictions=texts, references=query_ids, gallery_embeds=images, gallery_person_ids=list(dataset["person_id"])
)
search = pipeline("text-to-person-retrieval", model=model_name, trust_remote_code=True, device="cpu")
found = search.index(dataset, progress=False)(captions[0], top_k=5)
print(json.dumps({"features": torch.cat([texts, images]).tolist(), "figures": figures, "captions": captions,
                  "found": [entry["path"] for entry in found]}))
"""
# Computes the features of captions with an adapter that is attached to its base.
ATTACH = """
import json, sys, torch
from eccl.hub.adapter import load_adapter
from eccl.hub.loading import load_model
model = load_adapter(sys.argv[1]).eval()
_, processor = load_model(sys.argv[1])
captions = json.loads(sys.argv[2])
with torch.no_grad():
    texts = model.get_text_features(processor(text=captions, return_tensors="pt")["input_ids"]).pooler_output
print(json.dumps(texts.tolist()))
"""


def run(folder: Path, hub: LoopbackHub, *command: str) -> str:
    """Runs a command in a new process with an empty cache, and returns its output."""
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
    """Returns for each comparison its name, the largest difference, and the allowed difference."""
    hub = LoopbackHub()
    try:
        return _compare(folder, hub)
    finally:
        hub.close()


def _compare(folder: Path, hub: LoopbackHub) -> list[tuple[str, float, float]]:
    _publish_everything(folder, hub)
    here = json.loads(run(folder, hub, "-c", SCORE, str(folder / "run"), str(folder / "data"),
                          str(ROOT / "eval" / "person_retrieval"), "here").splitlines()[-1])  # fmt: skip
    alone = json.loads(run(folder, hub, "-c", SCORE, MODEL, DATA, METRIC, "alone").splitlines()[-1])
    captions = here["captions"]
    attached = json.loads(run(folder, hub, "-c", ATTACH, ADAPTER, json.dumps(captions)).splitlines()[-1])
    load_backbone = ATTACH.replace("load_adapter(sys.argv[1])", "load_model(sys.argv[1])[0]")
    untrained = json.loads(run(folder, hub, "-c", load_backbone, BACKBONE, json.dumps(captions)).splitlines()[-1])
    # The comparisons mean something only if the two training steps changed the model.
    if difference(untrained, here["features"][: len(captions)]) < 1e-3:
        raise RuntimeError("training did not change the features")
    figures = max(abs(alone["figures"][name] - figure) for name, figure in here["figures"].items())
    return [
        ("features by name, without this package", difference(alone["features"], here["features"]), 1e-6),
        ("features of the adapter by name, captions", difference(attached, here["features"][: len(captions)]), 1e-5),
        ("figures of the metric by name", figures, 0.0),
        ("captions of the data set by name that differ", float(alone["captions"] != captions), 0.0),
        ("results of the pipeline by name that differ", float(alone["found"] != here["found"]), 0.0),
        ("private data set left public", float(not hub.repositories["dataset", DATA]["private"]), 0.0),
    ]


def _publish_everything(folder: Path, hub: LoopbackHub) -> None:
    """Makes a data set, trains a model on it, and publishes the backbone, model, adapter, data set and metric."""
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


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Returns the largest difference of two entries, divided by the largest entry."""
    pairs = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        comparisons = check(Path(folder))
    for name, worst, allowed in comparisons:
        print(f"{name:46} {worst:8.1e} (allowed {allowed:.0e}){'' if worst <= allowed else '  OUTSIDE'}")
    sys.exit(any(worst > allowed for _, worst, allowed in comparisons))


if __name__ == "__main__":
    main()
