"""Codecs: how a tensor is kept and moved in fewer bytes. A codec is no device: any tier may use any codec."""

from flexgen.quant.codec import CODECS, Codec, codec_for, head_format

__all__ = ["CODECS", "Codec", "codec_for", "head_format"]
