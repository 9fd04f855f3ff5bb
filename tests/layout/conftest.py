from streamed_layers import make_layers, saved, stream, stream_layers  # noqa: F401
