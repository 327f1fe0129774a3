"""CUHK-PEDES: Person Search with Natural Language Description, CVPR 2017."""

from .annotations import Layout
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class CuhkPedes(PersonRetrievalBuilder):
    """CUHK-PEDES: train, val, test; two captions an image. On request from its owners, for academic use."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(name="cuhk_pedes", layout=Layout("CUHK-PEDES", ("reid_raw.json",), ("file_path",)))
    ]
