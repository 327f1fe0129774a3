"""Digests of models: two runs, or two galleries, used the same model if their digests are equal."""

import hashlib
import json

import torch

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel
from ..processing_eccl import ECCLProcessor

# With equal weights, these settings of an encoder still decide its features.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")


def digest_model(model: ECCLModel) -> str:
    """Computes a SHA-256 digest of the names, the types and the values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_encoder(model: ECCLModel, processor: ECCLProcessor) -> str:
    """Computes a SHA-256 digest of everything that decides features: weights, prompts and settings of both."""
    return digest_settings(digest_model(model), model.config, processor)


def digest_settings(weights: str, config: ECCLConfig, processor: ECCLProcessor) -> str:
    """Computes the digest of [`digest_encoder`] from the digest of the weights, see [`digest_model`]."""
    images = processor.image_processor
    settings = {
        "weights": weights,
        "encoders": [[getattr(part, name) for name in _SETTINGS] for part in config.encoder_configs],
        "images": [dict(images.size), images.image_mean, images.image_std, images.rescale_factor, int(images.resample)],
        "tokens": sorted(processor.tokenizer.get_vocab().items()),
        "longest": processor.max_text_length,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


__all__ = ["digest_encoder", "digest_model", "digest_settings"]
