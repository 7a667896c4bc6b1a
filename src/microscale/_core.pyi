"""The C++ core, csrc/bind.cc. Addresses are of contiguous memory, 0 where there is none; see csrc/microscale.h."""

def packed_bytes(format: int, experts: int, n: int, k: int, /) -> int: ...
def pack(
    format: int, experts: int, n: int, k: int, codes: int, scales: int, packed: int, threads: int, /
) -> None: ...
def unpack(packed: int, bytes: int, codes: int, scales: int, threads: int, /) -> None: ...
def linear(
    level: int,
    w: int,
    outer: int,
    dtype: int,
    x: int,
    x_stride: int,
    m: int,
    bias: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def dense(
    level: int,
    weight_dtype: int,
    w: int,
    w_stride: int,
    n: int,
    k: int,
    bias: int,
    dtype: int,
    x: int,
    x_stride: int,
    m: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    level: int, dtype: int, x: int, m: int, n: int, weight_dtype: int, w: int, epsilon: float, y: int, /
) -> None: ...
def attend(
    level: int,
    dtype: int,
    scale: float,
    shape: tuple[int, ...],
    q: int,
    k: int,
    v: int,
    strides: tuple[int, ...],
    mask: int,
    sinks: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def moe(
    level: int,
    w13: int,
    outer13: int,
    w2: int,
    outer2: int,
    dtype: int,
    x: int,
    m: int,
    ids: int,
    weights: int,
    t: int,
    kind: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    beta: float,
    limit: float,
    b13: int,
    b2: int,
    weight_on_input: bool,
    y: int,
    threads: int,
    /,
) -> None: ...
def level() -> int: ...
def compiled_level() -> int: ...
def read_rate(start: int, bytes: int, threads: int, /) -> float: ...
def multiply_rate(level: int, threads: int, /) -> float: ...
