"""The synthetic person-retrieval benchmark: people drawn from attributes, captioned by a grammar."""

from .generator import ANNOTATION_FILES, LABELS_FILE, SIZES, SyntheticBenchmark, write_benchmark

__all__ = ["ANNOTATION_FILES", "LABELS_FILE", "SIZES", "SyntheticBenchmark", "write_benchmark"]
