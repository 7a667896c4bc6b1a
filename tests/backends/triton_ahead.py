"""Triton kernels compiled for GPUs that are not here, and weights of random bytes; for the tests beside this file."""

from __future__ import annotations

from typing import Any

import torch

from microscale.formats import FORMATS
from microscale.quant import QuantTensor

# Kind, architecture, lanes of a warp, what machine code is called, bytes of shared memory.
TARGETS = {
    "sm_80": ("cuda", 80, 32, "cubin", 163 << 10),
    "sm_90": ("cuda", 90, 32, "cubin", 227 << 10),
    "sm_100": ("cuda", 100, 32, "cubin", 227 << 10),
    "gfx942": ("hip", "gfx942", 64, "hsaco", 64 << 10),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(
    kernel: Any, target: str, given: dict[str, Any], options: dict[str, Any], sixteens: tuple[str, ...] = ()
) -> Any:
    """Compile for a GPU that is not here.

    Args:
        given: by argument: a type word ("*bf16", "i32", "fp32") or a compile-time value.
        sixteens: integers that are multiples of 16.
    Returns:
        The compiled kernel: `asm` has the stages of compilation by name, `metadata.shared` bytes of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    words = ("*", "i32", "fp32", "tensordesc")
    types = {
        n: v for n, v in given.items() if isinstance(v, str) and v.startswith(words) and n in kernel.arg_names
    }
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    constants = {n: given[n] for n in kernel.arg_names if n not in types}
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
        for n, t in types.items()
        if t[0] == "*" or n in sixteens
    }
    kind, arch, warp, *_ = TARGETS[target]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(kind, arch, warp), options=options)


def compile_ahead(kernel: Any, target: str, given: dict[str, Any], options: dict[str, Any]) -> int:
    """`compiled`: the bytes of machine code."""
    return len(compiled(kernel, target, given, options).asm[TARGETS[target][3]])


def random_bytes(name: str, shape: tuple[int, ...]) -> QuantTensor:
    """Any codes and any scales: a layout must not look at what they mean. What lies past K is 0."""
    fmt = FORMATS[name]
    codes = torch.randint(256, (*shape[:-1], fmt.packed_columns(shape[-1])), dtype=torch.uint8)
    spare = codes.shape[-1] * 8 - shape[-1] * fmt.element.bits
    codes[..., -1] &= 255 >> spare
    scales = torch.randint(256, (*shape[:-2], *fmt.scale_shape(*shape[-2:])), dtype=torch.uint8)
    outer = torch.rand(*shape[:-2], 1) if fmt.tensor_scale else None
    return QuantTensor(
        fmt, shape, codes, scales.float() if fmt.scale == "f32" else scales, outer, fmt.rules[0]
    )
