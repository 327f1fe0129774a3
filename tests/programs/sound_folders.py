"""A sound folder of each kind that commands read: tests change them, one mistake or attack at a time."""

import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from eccl.hub.adapter import attach_lora, save_adapter
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor, load_tokenizer
from helpers import GOLDENS

SIZE = (32, 16)


def make_sound_folders(folder: Path, benchmark: Path, backbone: Path) -> Path:
    """Makes `benchmark`, `backbone`, `merged`, `sharded`, `clip`, `adapter`, `original` and `gallery` in a folder."""
    shutil.copytree(benchmark, folder / "benchmark")
    shutil.copytree(backbone, folder / "backbone")
    torch.manual_seed(0)
    model = ECCLModel.from_clip(str(backbone), SIZE, prompt_depth=2)
    processor = ECCLProcessor.for_model(model.config, load_tokenizer(backbone))
    for name in ("merged", "sharded", "clip"):
        processor.save_pretrained(folder / name)
    model.save_pretrained(folder / "merged")
    model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32}, projection_dim=16))
    clip.save_pretrained(folder / "clip")
    save_adapter(attach_lora(model), folder / "adapter", str(folder / "backbone"))
    (folder / "original").mkdir()
    for name in ("clip_openai.pt", "irra_pretrained.pth", "eccl_original.pth"):
        shutil.copy(GOLDENS / name, folder / "original")
    (folder / "gallery").mkdir()
    for number, path in enumerate(sorted((folder / "benchmark" / "imgs").rglob("*.jpg"))[:2]):
        shutil.copy(path, folder / "gallery" / f"{number}.jpg")
    return folder
