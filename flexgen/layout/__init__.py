"""The storage and the moves of all data, as sizes and lanes without tensors.

The memory plan sums the sizes, the predictor times the moves, and the runtime allocates the buffers and executes the
moves. None of them makes its own decisions about storage or moves.
"""
