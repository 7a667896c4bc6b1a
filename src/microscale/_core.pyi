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
def stored(
    level: int,
    format: int,
    dtype: int,
    x: int,
    x_stride: int,
    m: int,
    k: int,
    to: int,
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
    stored: int,
    b13: int,
    b2: int,
    weight_on_input: bool,
    y: int,
    threads: int,
    /,
) -> None: ...
def route(
    level: int,
    dtype: int,
    logits: int,
    m: int,
    experts: int,
    router: int,
    renormalize: bool,
    rounded: int,
    chosen: int,
    ids: int,
    weights: int,
    /,
) -> None: ...

class Chain:
    """Steps of `ms_token`; what the addresses are of must outlive it."""

    def __init__(self, dtype: int, m: int, /) -> None: ...
    def embed(self, table: int, count: int, n: int, ids: int, y: int, /) -> None: ...
    def norm(
        self, x: int, more: int, weight_dtype: int, w: int, n: int, epsilon: float, twice: bool, y: int, /
    ) -> None: ...
    def dense(
        self, weight_dtype: int, k: int, weights: list[tuple[int, int, int, int]], x: int, y: int, /
    ) -> None: ...
    def linear(self, w: int, outer: int, bias: int, k: int, x: int, y: int, /) -> None: ...
    def attend(
        self,
        shape: tuple[int, ...],
        qkv: tuple[int, ...],
        strides: tuple[int, ...],
        norms: tuple[int, ...],
        weight_dtype: int,
        twice: bool,
        epsilon: float,
        scale: float,
        cos: int,
        sin: int,
        keys: int,
        values: int,
        sinks: int,
        y: int,
        /,
    ) -> None: ...
    def gate(self, kind: int, n: int, stride: int, gate: int, up: int, y: int, /) -> None: ...
    def route(
        self,
        logits: int,
        experts: int,
        router: int,
        renormalize: bool,
        rounded: int,
        chosen: int,
        ids: int,
        weights: int,
        /,
    ) -> None: ...
    def moe(
        self,
        w13: int,
        outer13: int,
        w2: int,
        outer2: int,
        x: int,
        ids: int,
        weights: int,
        chosen: int,
        kind: int,
        gated: bool,
        interleaved: bool,
        alpha: float,
        beta: float,
        limit: float,
        b13: int,
        b2: int,
        y: int,
        /,
    ) -> None: ...
    def run(self, level: int, position: int, threads: int, /) -> list[float]: ...

def level() -> int: ...
def compiled_level() -> int: ...
def read_rate(start: int, bytes: int, threads: int, /) -> float: ...
def multiply_rate(level: int, threads: int, /) -> float: ...
