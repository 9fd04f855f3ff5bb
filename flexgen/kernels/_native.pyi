"""The compiled kernels. Addresses are integers, types are the numbers in `loading.NUMBERS`."""

def decode_attention(
    type: int,
    q: int,
    out: int,
    lse: int,
    shape: tuple[int, int, int, int, int],
    format: tuple[int, int, int],
    keys: list[int],
    values: list[int],
    page_tokens: list[int],
    length: int,
    starts: int,
    ends: int,
    scoring: tuple[float, float, int, int],
    threads: int,
    /,
) -> None:
    """`shape`: rows, heads, kv_heads, new tokens, head_dim. q and `out`: (rows, new tokens, heads, head_dim).
    `format`: bits, group, bytes of a head. `starts` (rows, new tokens), `ends` (rows,): int64, 0 for none. `scoring`:
    scale, cap, and the addresses of slopes and sinks, all float32; 0 for none. `lse`: float32, 0 for none; with it,
    `out` is float32."""

def attend_prefix(
    type: int,
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    shape: tuple[int, int, int, int, int, int, int],
    first: int,
    positions: int,
    scoring: tuple[float, float, int],
    threads: int,
    /,
) -> None:
    """`shape`: rows, heads, kv_heads, new tokens, head_dim, tokens, elements between K/V heads. `first` (rows, new),
    `positions` (rows,): int64, 0 for none. `scoring`: as above, without sinks. `out` and `lse`: float32."""

def attend_prompt(
    type: int,
    q: int,
    k: int,
    v: int,
    out: int,
    lse: int,
    shape: tuple[int, int, int, int, int, int, int, int, int],
    first: int,
    scoring: tuple[float, float, int, int],
    threads: int,
    /,
) -> None:
    """`shape`: rows, heads, kv_heads, new tokens, head_dim, tokens, and the elements of K and V between rows, between
    heads and between tokens. q and out are (rows, new tokens, heads, head_dim), `lse` (rows, heads, new tokens)
    float32, 0 for none. `first` (new tokens,): the first token of each window, int64, 0 for none. `scoring`: as for
    `decode_attention`."""

def merge_parts(
    type: int,
    shape: tuple[int, int, int, int],
    out: int,
    parts: list[tuple[int, int, tuple[int, ...]]],
    threads: int,
    /,
) -> None:
    """`shape`: rows, heads, new tokens, head_dim. out (rows, new tokens, heads, head_dim) in `type`. parts: values
    and lse (rows, heads, new tokens), both float32, and the elements of values between rows, heads and new tokens."""

def choose(
    type: int,
    q: int,
    shape: tuple[int, int, int, int],
    keys: list[int],
    page_tokens: list[int],
    length: int,
    starts: int,
    ends: int,
    scale: float,
    share: float,
    unit: int,
    most: int,
    positions: int,
    weights: int,
    threads: int,
    /,
) -> None:
    """`shape`, `starts` and `ends` as above; `positions` int64, `weights` float32."""

def attend_chosen(
    type: int,
    shape: tuple[int, int, int, int],
    most: int,
    positions: int,
    weights: int,
    values: list[int],
    page_tokens: list[int],
    out: int,
    threads: int,
    /,
) -> None: ...
def quantise(
    type: int,
    scale_type: int,
    bits: int,
    group: int,
    groups: int,
    x: int,
    values: int,
    scales: int,
    minimums: int,
    threads: int,
    /,
) -> None: ...
def dequantise(
    type: int,
    scale_type: int,
    bits: int,
    group: int,
    groups: int,
    x: int,
    values: int,
    scales: int,
    minimums: int,
    threads: int,
    /,
) -> None: ...
def packed_linear(
    type: int,
    scale_type: int,
    bits: int,
    shape: tuple[int, int, int],
    x: int,
    matrices: list[tuple[int, int, int, int, int, int]],
    rounded: bool,
    encoding: tuple[int, int, int, int, int, int, bool] | None,
    threads: int,
    /,
) -> None:
    """The products of x with all matrices. `shape`: rows of x, in, group. Each matrix: out, y, bias (0 for none),
    values, scales, minimums. `rounded`: round x to int8, with a scale for each group; only for the variants avx2
    and avx512_bf16 and groups of 64. `encoding`: None for group-wise integers and half types; otherwise `Encoding` of
    cpp/kernels.h, and minimums are zero points or the scale of the whole matrix."""

def packed_linears(
    type: int,
    scale_type: int,
    bits: int,
    shape: tuple[int, int, int],
    products: list[tuple[int, int, int, int, int, int]],
    encoding: tuple[int, int, int, int, int, int, bool] | None,
    threads: int,
    /,
) -> None:
    """Products of several x, each with a matrix of its own, all of one shape. `shape`: out, in, group. Each product:
    rows of x, x, y, values, scales, minimums."""

def decode(
    type: int,
    scale_type: int,
    bits: int,
    shape: tuple[int, int, int],
    y: int,
    values: int,
    scales: int,
    minimums: int,
    encoding: tuple[int, int, int, int, int, int, bool],
    threads: int,
    /,
) -> None:
    """Decode a matrix to y, of `type`. `shape`: out, in, group."""

def rms_norm(
    type: int,
    round_first: bool,
    shape: tuple[int, int],
    x: int,
    weight: int,
    y: int,
    eps: float,
    plus: float,
    threads: int,
    /,
) -> None:
    """`shape`: rows, size. `weight`: 0 for none."""

def rotate(
    type: int,
    shape: tuple[int, int, int, int, int],
    q: int,
    q_stride: int,
    k: int,
    k_stride: int,
    factors: int,
    threads: int,
    /,
) -> None:
    """Rotate q and k in place. `shape`: rows, heads, kv_heads, head_dim, pairs. Strides: elements between rows."""

def silu_product(
    type: int, shape: tuple[int, int], gate: int, up: int, stride: int, y: int, y_stride: int, threads: int, /
) -> None:
    """`shape`: rows, size. `stride`: elements between rows of gate and of up. y may be gate."""

def add(type: int, count: int, out: int, x: int, threads: int, /) -> None:
    """out += x."""

def largest(type: int, shape: tuple[int, int], x: int, stride: int, indices: int, threads: int, /) -> None:
    """The index (int64) of the first of the largest values of each row, or -1 for a row with a NaN. `shape`: rows,
    size. `stride`: elements between rows."""

def store_tokens(
    shape: tuple[int, int, int, int, int],
    position: int,
    lengths: int,
    k: int,
    k_strides: tuple[int, int, int],
    k_pages: list[int],
    v: int,
    v_strides: tuple[int, int, int],
    v_pages: list[int],
    /,
) -> None:
    """Copy the keys and values of the new tokens of each row to their places in the pages, from `position` on, or
    from the position of the row in `lengths` (rows,) int64, 0 for none. `shape`: rows, kv_heads, new tokens, tokens
    of a page, bytes of a head. Strides: bytes between rows, heads and tokens."""

def grouped_linear(
    type: int,
    scale_type: int,
    bits: int,
    shape: tuple[int, int, int],
    groups: int,
    x: int,
    y: int,
    ends: int,
    addresses: int,
    encoding: tuple[int, int, int, int, int, int, bool] | None,
    threads: int,
    /,
) -> None:
    """`shape`: out, in, group. `ends` (groups,): int32. `addresses` (4, groups): int64, of values, scales, minimums
    and biases; 0 for none."""

def route(
    type: int,
    shape: tuple[int, int, int],
    logits: int,
    correction: int,
    form: tuple[bool, bool, bool, float, float],
    tokens: int,
    factors: int,
    places: int,
    ends: int,
    /,
) -> None:
    """`shape`: rows, experts, top_k. `correction`: float32, 0 for none. `form`: of `RouterForm`, without top_k."""

def gather_rows(rows: int, nbytes: int, x: int, count: int, indices: int, y: int, /) -> None:
    """Copy rows of x, which has `count` of them with `nbytes` each. `indices`: int64. Raises RuntimeError for other
    indices."""

def sum_experts(
    type: int,
    wide: bool,
    shape: tuple[int, int, int],
    x: int,
    factors: int,
    places: int,
    out: int,
    threads: int,
    /,
) -> None:
    """`shape`: rows, top_k, size. `out` is in float32 if `wide`."""

class Unrecordable(Exception):
    """A kernel was called that cannot be recorded."""

def record() -> None:
    """Record the calls of this thread from now on, instead of running kernels. A call that cannot be recorded raises
    `Unrecordable`."""

def end_record() -> object:
    """The recorded calls. Kernels run again."""

def replay(tapes: tuple[object, ...], later: int, threads: int, /) -> list[float]:
    """Repeat recorded calls, one tape after the other, with `later` more tokens in the cache: `store_tokens` and
    `decode_attention` add it to their position and length, if all rows have the same, and read those of rows again.
    Returns the seconds from the beginning to the end of each tape. Raises RuntimeError if the pages have no room for
    the tokens."""

def profile(tapes: tuple[object, ...], later: int, threads: int, /) -> list[tuple[str, float]]:
    """`replay` that returns the name and the seconds of each call."""

def read(address: int, nbytes: int, threads: int, /) -> int:
    """Read whole MiB once, as fast as the memory gives them; returns a checksum."""

def multiply_registers(steps: int, threads: int, /) -> int:
    """Repeat products of values in registers on each thread, the most that the arithmetic units can do; returns the
    number of operations. With products of bfloat16 they are in this type, otherwise in float32."""

def variants() -> list[str]:
    """The instruction sets that this processor has and the kernels know, best first."""

def variant() -> str:
    """The one in use."""

def set_variant(name: str, /) -> None: ...
