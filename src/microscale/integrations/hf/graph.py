"""Generation whose steps are replayed from a CUDA graph, or on the CPU from a chain of the core's kernels.

A token of gpt-oss-20b is some 600 kernels, which take the GPU a tenth of the time that Python takes to launch them. So
the second step of a generation is captured, and that one and those behind it are replayed. Prompts run as they always
do, and everything around the model's forward (sampling, stopping, streaming) stays transformers'.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from microscale.errors import brief
from microscale.integrations.hf import cpu_step
from microscale.integrations.hf.cpu_cache import TokenCache
from microscale.integrations.hf.cpu_parts import Parts
from microscale.integrations.hf.cpu_step import CpuStep
from microscale.integrations.hf.in_place import in_place_of, replacement
from microscale.integrations.hf.listeners import hooks_of, hooks_of_all
from microscale.integrations.hf.prompt_ids import check_prompt
from microscale.integrations.hf.step import MASKS, Step
from microscale.integrations.hf.step_cache import KINDS, StepCache, layer_kinds
from microscale.kv_cache import kv_cache
from microscale.nn import runner_of

_GRAIN = 256  # tokens that a cache's capacity is a multiple of at the least; masks must be aligned, too
_ROOM = 0.5  # of the free memory that a cache may take at once; transformers' own grows
# What `generate` may be asked for: nothing of it changes what a step computes.
_ALLOWED = {
    "attention_mask",
    "do_sample",
    "eos_token_id",
    "logits_processor",
    "pad_token_id",
    "streamer",
    "temperature",
    "top_k",
    "top_p",
}
# Settings of a generation config that would change it, and the value at which they do not.
_PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
    "penalty_alpha": None,
    "output_attentions": False,
    "output_hidden_states": False,
}


class Decoder:
    """Generates with one model, and keeps the captured step for the next prompt.

    On the CPU a step is one call of the C++ core for architectures that it has a chain for, and the model's own forward
    for others; `why` and `fused` say which.

    Hooks in a model are called while a step runs and is captured; of a replayed one, what they launched is replayed and
    nobody is called. With `graph=False` each token calls them.

    One sequence, or a batch of sequences of one length: of padded ones the steps are not replayed, and `why` says so.

    Attributes:
        why: why the steps of the last generation were not replayed, in a sentence; None: they were.
        fused: they were a chain of kernels, and not its modules', each by itself (see `chain_parts`).
        why_modules: why they were its modules', in a sentence: a hook anywhere in a model, say. None: they were not.
    """

    def __init__(self, model: Any, graph: bool = True) -> None:
        """`graph=False`: never capture."""
        self.model = model
        self._never = refuse(model) if graph else "replaying steps is switched off"
        self.why = self._never
        self.fused = False
        self.why_modules: str | None = None
        self._cache: StepCache | None = None
        self._step: Step | CpuStep | None = None
        self._weights: tuple[list[int], list[Any]] = [], []
        self._busy = Lock()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **arguments: Any) -> Tensor:
        """transformers' `generate` of [B, T] ids; returns [B, T + new] ids.

        Args:
            arguments: of `generate`. Some, such as beams, are for steps that are not captured.

        There is one cache: what is asked for while a generation runs, from another thread say, takes no part in it.

        Raises:
            PromptError: the ids are not integers [B, T], there are none, or the model has no such token.
        """
        check_prompt(self.model, input_ids)
        call: dict[str, Any] = {"input_ids": input_ids, "max_new_tokens": max_new_tokens, **arguments}
        if not self._busy.acquire(blocking=False):
            return self._generate(call)
        try:
            return self._generate_alone(input_ids, max_new_tokens, arguments, call)
        finally:
            self._busy.release()

    def _generate_alone(
        self, input_ids: Tensor, max_new_tokens: int, arguments: dict[str, Any], call: dict[str, Any]
    ) -> Tensor:
        room = min(max_new_tokens, cpu_step.ROOM) if chained(self.model) else max_new_tokens
        batch, capacity = input_ids.shape[0], capacity_for(input_ids.shape[1] + room)
        self.why = (
            self._never or self._refuse_call(input_ids, arguments) or self._refuse_room(batch, capacity)
        )
        parts = None
        if self.why is None and chained(self.model):
            parts = cpu_step.parts_for(self.model, batch)
            self.why = parts if isinstance(parts, str) else None
        self.fused, self.why_modules = False, None
        if self.why is not None:
            return self._generate(call)
        ready = self._ready(batch, capacity) if parts is None else self._ready_on_cpu(batch, capacity, parts)
        cache, step = ready
        self.why = "two steps run before one is replayed"
        step.greedy = not arguments.get("do_sample", self.model.generation_config.do_sample)
        try:
            with on_device(self.model.device), in_place_of(self.model, step):
                try:
                    return self._generate(call | {"past_key_values": cache})
                finally:
                    step.finish()
        finally:
            if step.why is not None:
                self._never, self._cache, self._step = step.why, None, None
            if step.why is not None or step.captured:
                self.why = step.why
                self.fused = step.captured and step.fused
                self.why_modules = step.why_modules if step.captured else None

    def _generate(self, call: dict[str, Any]) -> Tensor:
        found: Tensor = self.model.generate(**call)
        return found

    def _refuse_call(self, input_ids: Tensor, arguments: dict[str, Any]) -> str | None:
        asked = sorted(set(arguments) - _ALLOWED)
        if asked:
            return f"{asked[0]} was given to generate, and a captured step does not know it"
        config = self.model.generation_config
        for name, plain in _PLAIN.items():
            value = getattr(config, name, None)
            if value and value != plain:
                return (
                    f"the generation config has {name} = {brief(value)}, and a captured step does not know it"
                )
        if getattr(config, "use_cache", None) is False:
            return "the generation config has use_cache = False, and a step needs a cache"
        mask = arguments.get("attention_mask")
        padded = self._looks_padded(input_ids, arguments) if mask is None else not bool(mask.all())
        if padded:
            return "prompts are padded, and a captured step takes sequences of one length"
        return None

    def _looks_padded(self, input_ids: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether `generate`, which was given no mask, makes one from padding tokens that it finds."""
        config = self.model.generation_config
        pad = arguments.get("pad_token_id")
        pad = config.pad_token_id if pad is None else pad
        if pad is None:
            return False
        pad = torch.as_tensor(pad, device=input_ids.device)
        eos = arguments.get("eos_token_id", config.eos_token_id)
        ends = eos is not None and torch.isin(torch.as_tensor(eos, device=input_ids.device), pad).any()
        return not ends and bool(torch.isin(input_ids, pad).any())

    def _refuse_room(self, batch: int, capacity: int) -> str | None:
        if self.model.device.type != "cuda" or self._fits(batch, capacity):
            return None
        kv = kv_cache(self.model.config.get_text_config(decoder=True))
        early = min(capacity, kv.window) if kv.window else capacity
        wanted = batch * (early * kv.per_token + (capacity - early) * kv.beyond)
        where = self.model.device
        unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)  # but torch's
        free = torch.cuda.mem_get_info(where)[0] + unused
        if wanted <= _ROOM * free:
            return None
        return f"its cache would take {wanted / 1e9:.1f} GB at once, and {free / 1e9:.1f} GB are free"

    def _fits(self, batch: int, capacity: int) -> bool:
        """Whether the cache of before is for this batch and config, and neither too small nor far too large."""
        cache, step = self._cache, self._step
        if cache is None or step is None or step.batch != batch:
            return False
        if not cache.suits(self.model.config.get_text_config(decoder=True)):
            return False
        return capacity <= cache.capacity <= 2 * capacity

    def _ready(self, batch: int, capacity: int) -> tuple[StepCache, Step]:
        """A cache that is empty, and its step: those of before where they fit."""
        weights = _weights(self.model)
        cache, step = self._cache, self._step
        if (
            cache is None
            or not isinstance(step, Step)
            or not self._fits(batch, capacity)
            or weights[0] != self._weights[0]
        ):
            self._cache = self._step = cache = step = None  # its memory first
            cache = StepCache(self.model.config.get_text_config(decoder=True), capacity, self.model.device)
            step = Step(self.model, cache, batch)
            self._cache, self._step, self._weights = cache, step, weights
        cache.reset()
        return cache, step

    def _ready_on_cpu(self, batch: int, capacity: int, parts: Parts | str) -> tuple[StepCache, CpuStep]:
        """A new step: it reads the weights of this moment. Its cache may be the one of before."""
        cache = self._cache if self._fits(batch, capacity) else None
        if not (isinstance(cache, TokenCache) and cache.holds(self.model.dtype)):
            self._cache = self._step = None
            cache = TokenCache(self.model.config.get_text_config(decoder=True), capacity, self.model.device)
        step = CpuStep(parts, cache, batch)
        self._cache, self._step = cache, step
        cache.reset()
        return cache, step


def capacity_for(tokens: int) -> int:
    """Of a cache for so many tokens, in steps of up to a quarter, so that a conversation rarely needs another."""
    grain = max(_GRAIN, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // grain) * grain


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A graph is captured, and waited for, on streams of the current GPU: while it lasts, that is the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chained(model: Any) -> bool:
    """Whether the steps of a model are chains of the core's, if they are replayed at all."""
    return bool(model.device.type == "cpu")


def refuse(model: Any) -> str | None:
    """None, or why the steps of a model cannot be replayed whatever it is asked, in a sentence."""
    if model.device.type not in ("cuda", "cpu"):
        return f"CUDA graphs are for CUDA, and the model is on {model.device.type}"
    return refuse_model(model)


def refuse_model(model: Any) -> str | None:
    """None, or what about a model a `Step` does not know, wherever it is."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it has an encoder, which a captured step does not know"
    strange = sorted(set(layer_kinds(config)) - set(KINDS))
    if strange:
        return f"it has layers of {strange[0]}, whose cache a captured step does not know"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share keys, which a captured step does not know"
    inputs = getattr(type(model), "prepare_inputs_for_generation", None)  # torch.compile's wrapper has none
    own = inputs is not GenerationMixin.prepare_inputs_for_generation
    if own or hasattr(model, "create_masks_for_generate"):
        return "it makes its inputs or masks in a way of its own, which a captured step does not know"
    attention = model.config._attn_implementation
    if attention not in MASKS:
        return f"its attention is {attention}, and captured steps hand a mask to {', '.join(MASKS)}"
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        return f"it lies on {len(devices)} devices"
    return None


def _weights(model: Any) -> tuple[list[int], list[Any]]:
    """What a captured step reads, and who listened in as it was made: addresses and identities, and the packed weights
    and hooks, to be kept while these count."""
    held: list[Any] = []
    for module in model.modules():
        runner = runner_of(module)
        held += [] if runner is None else [runner.placement]
        held += [*hooks_of(module), replacement(module)]
    numbers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    modes = [int(model.training), int(torch.is_autocast_enabled(model.device.type)), len(hooks_of_all())]
    return numbers + modes + [id(one) for one in held], held
