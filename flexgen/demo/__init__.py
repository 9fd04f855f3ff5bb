"""The embedded model `demo`: a small OPT, its tokenizer and the tasks it was trained on.

`MODEL_DIR` is a normal model directory (`config.json`, `model.safetensors`, `tokenizer.json`, ...), so any program
that loads OPT checkpoints can load it. The tasks have exact answers: the share of correct answers shows whether a
codec or a schedule changed the output of the model.
"""

from pathlib import Path

from flexgen.demo.tasks import TASKS, Record, accuracy, is_right, records

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""The folder with the weights, the tokenizer and the card of the embedded model."""

__all__ = ["MODEL_DIR", "TASKS", "Record", "accuracy", "is_right", "records"]
