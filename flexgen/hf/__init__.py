"""The face of transformers' models: `FlexGenForCausalLM` stands where an `AutoModelForCausalLM` stood."""

from flexgen.hf.model import FlexGenForCausalLM

__all__ = ["FlexGenForCausalLM"]
