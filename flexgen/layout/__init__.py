"""Where everything is stored and how it travels, as data: sizes and lanes, no tensors.

The memory plan sums the sizes, the predictor times the moves, and the runtime allocates the buffers and does the
moves. None of them decides a second time what is stored or what travels.
"""
