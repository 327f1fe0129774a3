"""RSTPReid: DSSL, ACM Multimedia 2021."""

from .annotations import Layout
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class RstpReid(PersonRetrievalBuilder):
    """RSTPReid: train, val, test; five images a person, two captions an image."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(name="rstpreid", layout=Layout("RSTPReid", ("data_captions.json",), ("img_path",)))
    ]
