"""gpt-oss with MXFP4 experts, as OpenAI published it: `<name>_blocks` beside `<name>_scales`.

blocks: uint8 [..., N, K/32, 16], so [..., N, K/2] as they lie, low nibble first; scales: E8M0 [..., N, K/32].
Rows of gate_up_proj alternate gate, up, gate, up, and stay so: `activation` says it.
Source: openai/gpt-oss, gpt_oss/torch/weights.py; transformers, integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.checkpoints.config import CONFIG, flag, integer, positive, quant_method
from microscale.checkpoints.dialect import Entry, expect, plain_entry
from microscale.checkpoints.source import Source
from microscale.errors import CheckpointError, brief
from microscale.formats import get_format
from microscale.quant import QuantTensor

NAME = "gpt_oss"
METHODS: tuple[str, ...] = ("mxfp4",)

BLOCK = 32
MAX_SIZE = 2**24  # of any one dimension but the vocabulary's; a bound on lies, a thousand times any model
MAX_LAYERS = 1024
MAX_PATTERNS = 4096
MAX_GLOBS = 256  # patterns with wildcards, each tried on each module
MAX_PATTERN = 256  # characters

_TOP_K = 4  # transformers' default
_PACKED_NAMES = {"w13": "gate_up_proj", "w2": "down_proj", "weight": "weight"}
_SETTINGS = {"quant_method", "modules_to_not_convert", "dequantize"}


@dataclass(frozen=True)
class Sizes:
    """What config.json says of the shapes. `head_dim` and `num_key_value_heads` may be left out there."""

    hidden: int
    intermediate: int
    experts: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    attention_bias: bool


def matches(config: dict[str, Any]) -> bool:
    """quant_method is "mxfp4"."""
    return quant_method(config, CONFIG) in METHODS


def read(source: Source, config: dict[str, Any]) -> list[Entry]:
    """Every tensor's entry, layer by layer; names, dtypes and shapes checked, no data read.

    Experts are "w13" [E, 2I, H], "w13_bias", "w2" [E, H, I] and "w2_bias" of "...mlp.experts". A linear is
    packed (format mxfp4), or 16-bit (format None) whether modules_to_not_convert lists it or not.

    Raises:
        CheckpointError: names the file, tensor, and what was expected and found.
    """
    path = source.path / CONFIG
    s = _sizes(config, path)
    activation(config, path)
    listed = _unconverted(config, path)
    h, q_rows, kv_rows = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim

    entries = [plain_entry(source, "model.embed_tokens.weight", (s.vocab, h))]
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        entries.append(plain_entry(source, f"{layer}.input_layernorm.weight", (h,)))
        for name, n, k in (
            ("q_proj", q_rows, h),
            ("k_proj", kv_rows, h),
            ("v_proj", kv_rows, h),
            ("o_proj", h, q_rows),
        ):
            module = f"{layer}.self_attn.{name}"
            entries.append(_linear(source, module, (n, k), listed))
            if s.attention_bias:
                entries.append(plain_entry(source, f"{module}.bias", (n,)))
        entries.append(plain_entry(source, f"{layer}.self_attn.sinks", (s.heads,)))
        entries.append(plain_entry(source, f"{layer}.post_attention_layernorm.weight", (h,)))
        router, experts = f"{layer}.mlp.router", f"{layer}.mlp.experts"
        entries.append(_linear(source, router, (s.experts, h), listed))
        entries.append(plain_entry(source, f"{router}.bias", (s.experts,)))
        for role, n, k in (("w13", 2 * s.intermediate, h), ("w2", h, s.intermediate)):
            entries.append(_packed(source, experts, role, (s.experts, n, k), listed))
            bias = f"{experts}.{_PACKED_NAMES[role]}_bias"
            entries.append(plain_entry(source, bias, (s.experts, n), f"{role}_bias"))
    entries.append(plain_entry(source, "model.norm.weight", (h,)))
    if not s.tied:
        entries.append(_linear(source, "lm_head", (s.vocab, h), listed))

    unexpected = set(source.names()).difference(*(e.tensors for e in entries))
    if unexpected:
        name = min(unexpected)
        raise CheckpointError(source.info(name).file, "unexpected in gpt-oss with this config", tensor=name)
    return entries


def load(source: Source, entry: Entry) -> QuantTensor:
    """A packed entry as it lies in the map: nothing is read or copied."""
    blocks, scales = (source.tensor(name) for name in entry.tensors)
    return QuantTensor(get_format("mxfp4"), entry.shape, blocks.flatten(-2), scales)


def packed_entry(module: str, role: str, shape: tuple[int, ...]) -> Entry:
    """The entry of an mxfp4 tensor: role "w13" or "w2" of experts, "weight" of a linear."""
    name = f"{module}.{_PACKED_NAMES[role]}"
    return Entry(module, role, "mxfp4", (f"{name}_blocks", f"{name}_scales"), shape)


def store(entry: Entry, weight: QuantTensor) -> dict[str, Tensor]:
    """The inverse of `load`: named tensors to write, views of `weight`.

    Raises:
        CheckpointError: `weight` is not what the entry says.
    """
    if (weight.format.name, weight.shape) != (entry.format, entry.shape):
        found = (weight.format.name, weight.shape)
        raise CheckpointError(entry.module, "cannot store", expected=(entry.format, entry.shape), found=found)
    blocks, scales = entry.tensors
    return {blocks: weight.codes.view(*weight.scales.shape, BLOCK // 2), scales: weight.scales}


def nan_scales(weight: QuantTensor) -> int:
    """How many E8M0 scales are 255, NaN. Reads all scales, so it is not part of opening."""
    flat = weight.scales.reshape(-1)
    step = 1 << 20  # the mask is a copy, so never of everything
    return sum(int(torch.count_nonzero(flat[i : i + step] == 255)) for i in range(0, len(flat), step))


def activation(config: dict[str, Any], path: str | Path = CONFIG) -> Activation:
    """The experts' activation: gpt-oss's, with the config's swiglu_alpha and swiglu_limit where it has them.

    Raises:
        CheckpointError: one of them is not a positive number.
    """
    path = Path(path)
    alpha = positive(config, "swiglu_alpha", path, GPT_OSS.alpha)
    limit = positive(config, "swiglu_limit", path, GPT_OSS.limit or 7.0)
    return Activation("swiglu_oai", interleaved=True, alpha=alpha, beta=GPT_OSS.beta, limit=limit)


def _linear(source: Source, module: str, shape: tuple[int, int], listed: Callable[[str], bool]) -> Entry:
    """A weight, packed where `<module>.weight_blocks` or `_scales` exists."""
    if any(name in source for name in packed_entry(module, "weight", shape).tensors):
        return _packed(source, module, "weight", shape, listed)
    return plain_entry(source, f"{module}.weight", shape)


def _packed(
    source: Source, module: str, role: str, shape: tuple[int, ...], listed: Callable[[str], bool]
) -> Entry:
    """An mxfp4 entry, its two tensors checked."""
    entry = packed_entry(module, role, shape)
    blocks, scales = entry.tensors
    if blocks not in source and scales not in source:
        raise CheckpointError(source.path, "missing: quant_method says mxfp4", tensor=blocks)
    if listed(module):
        name = blocks if blocks in source else scales
        raise CheckpointError(
            source.info(name).file, "is packed, but modules_to_not_convert lists its module", tensor=name
        )
    if shape[-1] % BLOCK:
        raise CheckpointError(
            source.path,
            "row length is no multiple of the block",
            tensor=blocks,
            expected=BLOCK,
            found=shape[-1],
        )
    grid = (*shape[:-1], shape[-1] // BLOCK)
    expect(source, blocks, (torch.uint8,), (*grid, BLOCK // 2))
    expect(source, scales, (torch.uint8,), grid)
    return entry


def _sizes(config: dict[str, Any], path: Path) -> Sizes:
    kind = config.get("model_type")
    if kind != "gpt_oss":
        raise CheckpointError(
            path, "quant_method mxfp4 is read for one model_type only", expected="gpt_oss", found=brief(kind)
        )

    def size(key: str, maximum: int = MAX_SIZE, **default: int) -> int:
        return integer(config, key, path, maximum, **default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(path, "num_key_value_heads", expected=f"a divisor of {heads}", found=kv_heads)
    sizes = Sizes(
        hidden,
        size("intermediate_size"),
        size("num_local_experts"),
        size("num_hidden_layers", MAX_LAYERS),
        size("vocab_size", 2**31 - 1),
        heads,
        kv_heads,
        size("head_dim", default=hidden // heads),
        flag(config, "tie_word_embeddings", path, False),
        flag(config, "attention_bias", path, True),
    )
    # Nothing here is as large as these, but transformers fails on a wrong one only when a prompt has been read.
    size("num_experts_per_tok", sizes.experts, default=min(_TOP_K, sizes.experts))
    for key in ("sliding_window", "max_position_embeddings"):
        size(key, 2**31 - 1, default=1)
    for key, value in (("hidden_size", hidden), ("intermediate_size", sizes.intermediate)):
        if value % BLOCK:
            raise CheckpointError(path, key, expected=f"a multiple of {BLOCK}", found=value)
    return sizes


def _unconverted(config: dict[str, Any], path: Path) -> Callable[[str], bool]:
    """Whether `modules_to_not_convert` lists a module: a pattern names it, a parent, or the end of either."""
    settings = config["quantization_config"]
    for key in settings.keys() - _SETTINGS:
        raise CheckpointError(path, f"quantization_config has {brief(key)}, which is not known with mxfp4")
    patterns = settings.get("modules_to_not_convert")
    patterns = [] if patterns is None else patterns
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise CheckpointError(path, "modules_to_not_convert", expected="strings", found=brief(patterns))
    globs = [p for p in patterns if any(c in p for c in "*?[")]
    if len(patterns) > MAX_PATTERNS or len(globs) > MAX_GLOBS or any(len(p) > MAX_PATTERN for p in patterns):
        limits = f"{MAX_PATTERNS} patterns, {MAX_GLOBS} with wildcards, {MAX_PATTERN} characters each"
        raise CheckpointError(path, "modules_to_not_convert is too long", expected=f"at most {limits}")
    names = set(patterns).difference(globs)

    def listed(module: str) -> bool:
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            if any(".".join(parts[start:end]) in names for start in range(end)):
                return True
            if any(fnmatchcase(".".join(parts[:end]), glob) for glob in globs):
                return True
        return False

    return listed
