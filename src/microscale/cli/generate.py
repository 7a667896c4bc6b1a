"""One generation: streamed, timed, and its ids kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer, TextStreamer

from microscale.errors import MicroscaleError, PromptError, brief, one_line

if TYPE_CHECKING:
    from microscale import Decoder
    from microscale.cli.cpu_timing import Watch
    from microscale.cli.gpu_timing import GpuWatch
    from microscale.cli.timing import Timing


COLDEST = 1e-6  # temperatures below take the likeliest token: float32 has no room for logits over them


@dataclass(frozen=True)
class Settings:
    """How to choose tokens; None: as the checkpoint's generation_config says, which without one is greedily.

    Attributes:
        temperature: 0, or less than `COLDEST`, takes the likeliest token.
        seed: of the sampling.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def arguments(self, model: Any) -> dict[str, Any]:
        """For transformers' `generate`."""
        found: dict[str, Any] = {}
        if self.temperature is not None:
            found["do_sample"] = self.temperature >= COLDEST
            if found["do_sample"]:
                found["temperature"] = self.temperature
        if self.top_p is not None:
            found["top_p"] = self.top_p
            found.setdefault("do_sample", True)
        eos = model.generation_config.eos_token_id
        if beams(model) > 1:
            found["num_beams"] = 1  # text comes as it is made, and beams have none until the end
        first = next(iter(eos), None) if isinstance(eos, list) else eos
        if model.generation_config.pad_token_id is None and first is not None:
            found["pad_token_id"] = first
        return found

    def samples(self, model: Any) -> bool:
        """Whether the seed matters."""
        return bool(self.arguments(model).get("do_sample", model.generation_config.do_sample))


def beams(model: Any) -> int:
    """How many its generation config asks for.

    Raises:
        MicroscaleError: that is no number of beams.
    """
    count = getattr(model.generation_config, "num_beams", None)
    if count is None:
        return 1
    if type(count) is not int or count < 1:
        said = f"num_beams = {brief(count)}, and beams are 1 or more"
        raise MicroscaleError(f"the checkpoint's generation config has {said}")
    return count


@dataclass
class Generation:
    """What came out.

    Attributes:
        text: empty without a tokenizer.
        prefill, decode: seconds until the first token, and from there to the last.
        stopped: "length", "end" (the model ended it) or "interrupted".
        timing: where a decoded token's time went, if it was asked for and there are two.
        eager: why tokens were not replayed (from a CUDA graph, or on a CPU from a chain of kernels); None: they were.
        fused: they were a chain of kernels (see `Decoder`).
        why_modules: why they were the model's modules'; None: they were not.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    prefill: float = 0.0
    decode: float = 0.0
    stopped: str = "length"
    timing: Timing | None = None
    eager: str | None = None
    fused: bool = False
    why_modules: str | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return len(self.prompt_ids) / self.prefill if self.prefill else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second behind the first one; 0 where there are none."""
        return (len(self.ids) - 1) / self.decode if self.decode else 0.0


def generate(
    decoder: Decoder,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    settings: Settings,
    write: Callable[[str], None],
    interruptible: bool = False,
    watch: Watch | GpuWatch | None = None,
) -> Generation:
    """Run a prompt and hand over text as it comes, or ids in words where there is no tokenizer.

    Args:
        interruptible: Ctrl-C ends this generation only.
        watch: times it.
    Raises:
        PromptError: the prompt is empty or as long as the model's context.
        MicroscaleError: the model's answer to it is NaN, or settings contradict each other.
    """
    model = decoder.model
    settings = _fitted(model, len(prompt_ids), settings)
    result = Generation(list(prompt_ids))
    streamer = _Stream(tokenizer, result, write, watch)
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    arguments = settings.arguments(model)
    if tokenizer is None:  # random weights may end at once; their speed is what is asked for
        arguments["eos_token_id"] = None
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    try:
        with torch.inference_mode(), watch.running() if watch else nullcontext():
            decoder.generate(
                ids,
                settings.max_new_tokens,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                logits_processor=LogitsProcessorList([_RefuseNan()]),
                **arguments,
            )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, MicroscaleError):
            raise
        why = one_line(error)
        # Other errors say nothing without their names: "0", of a KeyError.
        if not isinstance(error, TypeError | ValueError):
            why = f"{type(error).__name__}: {why}"
        raise MicroscaleError(
            f"transformers does not generate by these settings, or the checkpoint's: {why}"
        ) from error
    except KeyboardInterrupt:
        streamer.end()
        result.stopped = "interrupted"
        if not interruptible:
            raise
    result.eager, result.fused, result.why_modules = decoder.why, decoder.fused, decoder.why_modules
    if streamer.times:
        result.prefill = streamer.times[0] - started
        result.decode = streamer.times[-1] - streamer.times[0]
    if watch is not None:
        result.timing = watch.result()
    if result.stopped == "length" and len(result.ids) < settings.max_new_tokens:
        result.stopped = "end"
    return result


class _RefuseNan:
    """Looks at the logits behind the prompt: of NaN, `generate` would make some token, and call it an answer.

    One of `generate`'s logits processors. A hook of the model's would say the same, but with a listener in it a model
    is not stepped by its own kernels.
    """

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, vocabulary] -> the same."""
        if not self._seen and bool(torch.isnan(scores).any()):
            raise MicroscaleError(
                "the model's logits are NaN behind the prompt: a weight or a scale is NaN, or too large "
                "(`microscale inspect MODEL --scan` finds NaN scales)"
            )
        self._seen = True
        return scores


def _fitted(model: Any, length: int, settings: Settings) -> Settings:
    """Settings whose tokens fit in the model's context behind a prompt."""
    if not length:
        raise PromptError("the prompt is empty")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return settings
    if length >= context:
        raise PromptError(f"the prompt has {length} tokens, and the model's context is {context}")
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, context - length))


class _Stream(BaseStreamer):
    """Notes when each token came, and passes text on in whole words."""

    def __init__(
        self, tokenizer: Any, result: Generation, write: Callable[[str], None], watch: Watch | GpuWatch | None
    ) -> None:
        self.result, self.write, self.watch = result, write, watch
        self.times: list[float] = []
        self.text: Any = None if tokenizer is None else _Words(tokenizer, self._add)
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt, then tokens one at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        if self.watch is not None:
            self.watch.token()
        self.times.append(time.perf_counter() - (self.watch.lost if self.watch else 0.0))
        self.result.ids += value.flatten().tolist()
        if self.text is None:
            self._add(f"{self.result.ids[-1]} ")
        else:
            self.text.put(value)

    def end(self) -> None:
        """Pass on what is left."""
        if self.text is not None:
            self.text.end()

    def _add(self, text: str) -> None:
        if text:
            self.result.text += text if self.text is not None else ""
            self.write(text)


class _Words(TextStreamer):
    def __init__(self, tokenizer: Any, add: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.add = add

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that no later token will change."""
        self.add(text)
