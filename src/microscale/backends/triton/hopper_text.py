"""The text of `hopper_wide.cu` and other kernels for a problem: constants, and instructions that depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from microscale.backends.triton.cuts import loops, wide_stages
from microscale.backends.triton.hopper_decode import assembly
from microscale.backends.triton.placement import LANDS

BOX_REGISTERS = 24  # of who has a linear's copied
MOST_REGISTERS = 240  # that a thread can ask for
COPY_REGISTERS = (56, 72)  # up to 144 tokens, and of more: addresses of a step
MOST_OF_TWO = 144  # tokens that a group has registers for which has two tiles of weights
KINDS = ("silu", "swiglu_oai", "swiglu_step")
STEPS = ("hopper_sizes.h", "hopper_stages.h", "hopper_steps.h")  # what decodes


@dataclass(frozen=True)
class Spec:
    """What the text is compiled for.

    Attributes:
        experts: both of their products, or a linear.
        element, scale: of the format, as in `hopper_decode`.
        most: tokens of a unit at most, a multiple of 16 up to 256; with two tiles each, or three users, up to 144. Of a
            linear a multiple of 8, and with two tiles each up to 176. With more tiles fewer, as registers have it.
        users: groups of warps that multiply, 2 to 4; of a linear 1 to 3.
        each: tiles of 64 rows of weights that each has, 1 to 3; of a linear 1 or 2.
        stages: of shared memory; with three users or more of experts an even number, and at least 4.
        bias: of w13 and w2, or of a linear; 0 none, 1 bfloat16, 2 float32.
        weights: of routes, 1 or 2 as there.
        top_k: experts of a token.
        row_scale: as `bias`, whether rows have a factor.
        kind, gated, apart, limit: of the activation; apart: gates and ups are not interleaved; two tiles each.
        routes, known: of experts whose programs sort routes themselves: room for so many, and experts that are here.
        id_bytes, map_bytes: of an expert's number among these routes, and in the map; 0: there is none.
        engine: codes of experts come by the copying engine, and not by all threads of a group of warps.
        rest: of a linear, tokens of units of another kind, which have twice the tiles and whose sums are of as many
            registers at most; 0: there are none.
    """

    experts: bool
    element: str
    scale: str
    most: int
    stages: int
    users: int = 2
    each: int = 1
    even: bool = False
    bias: tuple[int, ...] = (0, 0)
    weights: int = 0
    top_k: int = 1
    row_scale: tuple[bool, ...] = (False, False)
    kind: str = "silu"
    gated: bool = False
    apart: bool = False
    limit: bool = False
    routes: int = 0
    known: int = 0
    id_bytes: int = 0
    map_bytes: int = 0
    engine: bool = True
    rest: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens that there is a loop for, the greatest first."""
        if not self.experts:
            return tuple(sorted({self.most, self.rest or self.most}, reverse=True))
        return loops(self.most)

    @property
    def file(self) -> str:
        """The kernel's text."""
        return "hopper_wide.cu" if self.experts else "hopper_linear.cu"

    @property
    def function(self) -> str:
        """What profilers call the kernel."""
        return f"{self.file.removesuffix('.cu')}_kernel"

    @property
    def parts(self) -> tuple[str, ...]:
        """Files behind the instructions."""
        if not self.experts:
            return ("hopper_rows.h", "hopper_linear.h", *STEPS, self.file)
        loop = "hopper_wide_loop.h" if self.users == 2 else "hopper_turns.h"
        lists = ("hopper_lists.h",) if self.routes else ()
        parts = ("hopper_rows.h", "hopper_unit.h", *STEPS, "hopper_codes.h", loop)
        return (*parts, *lists, "hopper_tiles.h", self.file, "hopper_groups.h")

    @property
    def instructions(self) -> str:
        """`decode_group` and `Product`, which depend on the format and on numbers of tokens."""
        return _decode(self.element, self.scale) + _products(self)

    @property
    def threads(self) -> int:
        return 128 * (self.users + 1)

    @property
    def turn(self) -> int:
        """Steps that three groups or more count and wait for at a time. Four of many tokens are slower where gates and
        ups lie apart."""
        return 4 if self.stages % 4 == 0 and (self.most <= 48 or not self.apart) else 2

    @property
    def fewer(self) -> int:
        """Tiles that a group has in units which fill a last round, or 0: all units are alike. One in the place of two
        would leave a warp nothing to do while it waits; the loop of two groups has one number of tiles."""
        return 2 if self.each == 3 and self.users > 2 and not self.apart else 0

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that copies, and of one that multiplies: more than there are would wait for ever."""
        launched = 65536 // self.threads & -8
        copies = COPY_REGISTERS[self.most > 144] if self.experts else BOX_REGISTERS
        return copies, min(launched + (launched - copies) // self.users & -8, MOST_REGISTERS)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        tile = 512 * len(LANDS[self.element]) + (256 if self.scale == "e4m3" else 128)
        kinds = ((self.most, self.users * self.each), (self.rest, self.rest_tiles))
        return max(wide_stages(self.stages, tokens, tiles * tile) for tokens, tiles in kinds)

    @property
    def rest_tiles(self) -> int:
        """Of units of the other kind."""
        return 2 * self.users * self.each if self.rest else 0

    @property
    def finders(self) -> int:
        """Threads that sort routes."""
        return self.threads

    @property
    def lists(self) -> int:
        """Bytes of shared memory in which a program finds its tiles of tokens, or 0."""
        if not self.routes:
            return 0
        warps, tiles = -(-self.routes // 32), self.most_tiles(self.routes)
        of_tile = 2 * self.most + 3 + 2 * (self.most > 8)
        return warps * (self.known + 19) + 2 * self.known + of_tile * tiles + 16

    def most_tiles(self, routes: int) -> int:
        """Of tokens that so many routes can have."""
        return min(routes, self.known + routes // self.most)

    def given(self) -> dict[str, object]:
        """What the text has in capitals."""
        return {
            "KERNEL": self.function,
            "FP8": 0,
            "BITS": len(LANDS[self.element]),
            "E4M3_SCALES": int(self.scale == "e4m3"),
            "BLOCKS": int(self.scale == "f32"),
            "MOST": self.most,
            "STAGES": self.stages,
            "TURN": self.turn,
            "USERS": self.users,
            "EACH": self.each,
            "TILES": self.users * self.each,
            "FEWER": self.fewer,
            "REST": self.rest,
            "REST_TILES": self.rest_tiles,
            "ENGINE": int(self.engine),
            "COPY_REGISTERS": self.registers[0],
            "USE_REGISTERS": self.registers[1],
            "EVEN": int(self.even),
            "BIAS": ", ".join(map(str, self.bias)),
            "WEIGHTS": self.weights,
            "TOP_K": self.top_k,
            "ROW_SCALE": ", ".join(str(int(scaled)) for scaled in self.row_scale),
            "KIND": KINDS.index(self.kind),
            **{kind.upper(): i for i, kind in enumerate(KINDS)},
            "GATED": int(self.gated),
            "SIZES": ", ".join(map(str, self.sizes)),
            "EACH_SIZE(DO)": " ".join(f"DO({n})" for n in self.sizes),
            "APART": int(self.apart),
            "HAS_LIMIT": int(self.limit),
            "LISTED": int(self.routes > 0),
            "EXPERTS": self.known,
            "ROUTES": self.routes,
            "FINDERS": self.finders,
            "MOST_TILES": self.most_tiles(self.routes),
            "ID_BYTES": self.id_bytes,
            "MAP_BYTES": self.map_bytes,
        }


def constants(spec: Spec) -> str:
    """The lines that define what the text has in capitals."""
    return "".join(f"#define {name} {value}\n" for name, value in spec.given().items())


def part(name: str) -> str:
    """A file beside this one."""
    return (resources.files("microscale.backends.triton") / name).read_text("utf-8")


def text(spec: Spec) -> str:
    """The whole source."""
    return constants(spec) + part("hopper_ptx.h") + spec.instructions + kernel(spec)


def kernel(spec: Spec) -> str:
    """What comes behind the instructions."""
    return "".join(map(part, spec.parts))


def _decode(element: str, scale: str) -> str:
    """`decode_group` of 16 codes: the instructions of `hopper_decode`, for one group instead of two."""
    lines, words = assembly(element, scale)
    names = [f"w{i}" for i in range(words)] + ["s"]
    # Operands come twice in Triton's packs of two, of which the scales use the first.
    numbers = [*range(8, 8 + words), 8 + words + words % 2]
    for i in reversed(range(len(numbers))):
        lines = lines.replace(f"${numbers[i]}", f"%{8 + i}")
    for i in reversed(range(8)):
        lines = lines.replace(f"${i}", f"%{i}")
    quoted = "".join(f'      "{line}\\n"\n' for line in lines.splitlines() if line)
    outs = ", ".join(f'"=r"(o[{i}])' for i in range(8))
    ins = ", ".join(f'"r"({name})' for name in names)
    args = ", ".join(f"unsigned {name}" for name in names)
    return (
        f"DEVICE void decode_group(unsigned (&o)[8], {args}) {{\n"
        f"  asm(\n{quoted}      : {outs} : {ins});\n}}\n"
    )


def _products(spec: Spec) -> str:
    """`Product<N>::add`: w @ x of 64 rows in registers, N tokens in shared memory and 16 columns; added to d, or d."""
    found = ["template <int N> struct Product;\n"]
    for n in spec.sizes:
        sums = ", ".join(f"%{i}" for i in range(n // 2))
        outs = ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))
        w0, w1, w2, w3, x, more = (f"%{n // 2 + i}" for i in range(6))
        found.append(
            f"template <> struct Product<{n}> {{\n"
            f"  static DEVICE void add(float (&d)[{(spec.most if spec.experts else n) // 2}], const unsigned *w, "
            "unsigned long long x, int more) {\n"
            f'    asm volatile("{{.reg .pred p; setp.ne.s32 p, {more}, 0;\\n"\n'
            f'      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}, "\n'
            f'      "{{{w0}, {w1}, {w2}, {w3}}}, {x}, p, 1, 1, 0;}}"\n'
            f'      : {outs} : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x), "r"(more));\n  }}\n}};\n'
        )
    return "".join(found)
