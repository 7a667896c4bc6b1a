"""Machines we do not own, as facts: so that every decision can be shown and tested anywhere."""

from __future__ import annotations

from types import MappingProxyType

from microscale.machine import Gpu, Machine

_GIB = 1 << 30
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni"}
_ZEN = _AVX512 | {"avx512_bf16"}
_AMX = _ZEN | {"avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"}
_TORCH = "2.13.0"
_TRITON = (("triton", "3.6.0"),)


def _host(name: str, cpu: str, isa: frozenset[str], cores: int, gib: int, amx: bool = False) -> Machine:
    return Machine(name, cpu, isa, amx, cores, gib * _GIB, torch=_TORCH, compiler="/usr/bin/c++", core="amx")


def _server(name: str, kind: str, arch: str, gpu: str, gib: int, triton: bool = True) -> Machine:
    return Machine(
        name,
        "Intel Xeon Platinum 8480+",
        _AMX,
        True,
        56,
        512 * _GIB,
        (Gpu(kind, arch, gpu, gib * _GIB),),
        _TRITON if triton else (),
        _TORCH,
        "/usr/bin/c++",
        "amx",
    )


INVENTED: MappingProxyType[str, Machine] = MappingProxyType(
    {
        m.name: m
        for m in (
            _host("avx2-laptop", "Intel Core i7-10750H", _AVX2, 6, 16),
            _host("zen5", "AMD Ryzen 9 9950X", _ZEN, 16, 64),
            _host("sapphire-rapids", "Intel Xeon Platinum 8480+", _AMX, 56, 512, amx=True),
            _host("sapphire-rapids-no-amx", "Intel Xeon Platinum 8480+", _AMX, 56, 512),
            _host("plain-x86", "Intel Pentium Silver N6000", frozenset(), 4, 8),
            _server("t4", "cuda", "sm_75", "NVIDIA T4", 15),
            _server("a100", "cuda", "sm_80", "NVIDIA A100-SXM4-80GB", 80),
            _server("rtx4090", "cuda", "sm_89", "NVIDIA GeForce RTX 4090", 24),
            _server("h100", "cuda", "sm_90", "NVIDIA H100 80GB HBM3", 80),
            _server("h200", "cuda", "sm_90", "NVIDIA H200", 141),
            _server("b200", "cuda", "sm_100", "NVIDIA B200", 180),
            _server("rtx5090", "cuda", "sm_120", "NVIDIA GeForce RTX 5090", 32),
            _server("mi300x", "rocm", "gfx942", "AMD Instinct MI300X", 192),
            _server("mi355x", "rocm", "gfx950", "AMD Instinct MI355X", 288),
            _server("rx7900xtx", "rocm", "gfx1100", "AMD Radeon RX 7900 XTX", 24),
            _server("arc-b580", "xpu", "xe2", "Intel Arc B580", 12),
            Machine(
                "mac",
                "Apple M4 Max",
                frozenset({"neon"}),
                False,
                16,
                64 * _GIB,
                (Gpu("mps", "", "Apple M4 Max", 64 * _GIB),),
                torch=_TORCH,
                compiler="/usr/bin/c++",
                core="plain",
            ),
        )
    }
)
