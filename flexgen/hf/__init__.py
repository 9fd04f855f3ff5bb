"""The interface of transformers: `FlexGenForCausalLM` is a drop-in replacement for `AutoModelForCausalLM`."""

from flexgen.hf.model import FlexGenForCausalLM

__all__ = ["FlexGenForCausalLM"]
