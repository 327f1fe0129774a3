"""What several test modules need."""

from pathlib import Path

from eccl.configuration_eccl import ECCLConfig

GOLDENS = Path(__file__).parent / "goldens"
ROOT = Path(__file__).parent.parent


def tiny_config(**changes) -> ECCLConfig:
    """Two layers of 32 and 48, 4 x 2 patches: milliseconds a batch."""
    values = {
        "text_config": {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 58,
            "eos_token_id": 59,
            "pad_token_id": 59,
        },
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": [32, 16],
            "patch_size": 8,
        },
        "projection_dim": 24,
        "num_prompt_tokens": 3,
        "prompt_depth": 2,
    }
    return ECCLConfig(**(values | changes))
