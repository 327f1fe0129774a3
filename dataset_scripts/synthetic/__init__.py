"""The synthetic person-retrieval benchmark: persons drawn from attributes, with captions from a grammar."""

from .generator import ANNOTATION_FILES, LABELS_FILE, SIZES, SyntheticBenchmark, write_benchmark

__all__ = ["ANNOTATION_FILES", "LABELS_FILE", "SIZES", "SyntheticBenchmark", "write_benchmark"]
