"""ICFG-PEDES: Semantically Self-Aligned Network, 2021."""

from .annotations import Layout
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class IcfgPedes(PersonRetrievalBuilder):
    """ICFG-PEDES: train, test; one caption an image. On request from its owners."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="icfg_pedes", layout=Layout("ICFG-PEDES", ("ICFG-PEDES.json", "ICFG_PEDES.json"), ("file_path",))
        )
    ]
