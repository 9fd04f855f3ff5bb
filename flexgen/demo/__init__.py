"""The embedded model `demo`: a small OPT, its tokenizer and the record tasks it was trained on.

The folder `MODEL_DIR` has the usual layout of a model directory (`config.json`, `model.safetensors`,
`tokenizer.json`, ...), so whatever loads an OPT checkpoint loads this one. Its tasks have exact answers:
the share of right ones tells whether a codec or a schedule changed what the model says.
"""

from pathlib import Path

from flexgen.demo.tasks import TASKS, Record, accuracy, is_right, records

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder with the weights, the tokenizer and the card of the embedded model."""

__all__ = ["MODEL_DIR", "TASKS", "Record", "accuracy", "is_right", "records"]
