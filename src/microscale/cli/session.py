"""A loaded model and its tokenizer: opened, fed with prompts, reported on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from microscale import Decoder, load
from microscale.canary import device_kind
from microscale.checkpoints.config import CONFIG, quant_method, read_config
from microscale.checkpoints.strict import open_regular
from microscale.cli.explain import GRAPHS
from microscale.cli.generate import Generation, Settings, beams, generate
from microscale.cli.output import clean, progress, quiet_libraries, say
from microscale.dense import DenseModule
from microscale.errors import CheckpointError, MicroscaleError, PromptError, brief, one_line
from microscale.integrations.hf.dummy import dummy_config
from microscale.integrations.hf.linears import dense_modules
from microscale.integrations.hf.quantizer import runners
from microscale.layer_classes import kind_of
from microscale.models import resolve
from microscale.plan import outline

if TYPE_CHECKING:
    from microscale.cli.cpu_timing import Watch
    from microscale.cli.gpu_timing import GpuWatch

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
# Read beside them, or passed over without a word where they cannot be.
_BESIDE_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SHORT = 100_000  # characters that any tokenizer is done with at once
_NORMALISED = 4  # a tokenizer may drop what says nothing, such as spaces; not nearly so much of a text
_RANDOM_PROMPT = 16  # token ids


@dataclass
class Session:
    """A model that is ready.

    Attributes:
        tokenizer: None: prompts and results are token ids.
        chat: prompts go through the chat template.
        loading: seconds that it took.
        bytes: of weights that a decoded token reads; 0: nobody asked, and generations are not timed in detail.
        graph: replay tokens, from a CUDA graph or on a CPU from one chain of kernels, where that can be.
    """

    name: str
    model: Any
    tokenizer: Any
    settings: Settings
    chat: bool
    loading: float
    bytes: int = 0
    graph: bool = True

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.model, self.graph)

    def encode(self, prompt: str | None) -> tuple[str, list[int]]:
        """A prompt as text and ids. Without a tokenizer, `prompt` is ids in words, or None for random ones.

        Raises:
            PromptError: ids that are none, or a text that is not UTF-8, or so long that no context could hold it.
        """
        try:
            (prompt or "").encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not UTF-8 from character {error.start} on") from None
        if self.chat:
            return self.encode_chat([{"role": "user", "content": prompt or ""}])
        if self.tokenizer is not None:
            self._check_length(prompt or "")
            return prompt or "", list(self.tokenizer(prompt or "").input_ids)
        vocabulary = self.model.config.get_text_config().vocab_size
        if prompt is None:
            generator = torch.Generator().manual_seed(self.settings.seed)
            ids = torch.randint(vocabulary, (_RANDOM_PROMPT,), generator=generator).tolist()
        else:
            ids = _token_ids(self.name, prompt, vocabulary)
        return " ".join(map(str, ids)) + " ", ids

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """A conversation through the tokenizer's template, which transformers runs in a sandbox.

        Raises:
            MicroscaleError: the template fails.
            PromptError: as `encode`.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template divides, indexes and calls: whatever that raises is its fault
            raise MicroscaleError(f"the chat template of {self.name} fails: {one_line(error)}") from error
        self._check_length(text)
        return text, list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _check_length(self, text: str) -> None:
        """Before the tokenizer takes minutes over it: were each token the longest there is, it would still not fit."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or len(text) <= _SHORT:
            return
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        if len(text) > _NORMALISED * longest * context:
            raise PromptError(
                f"the prompt has {len(text)} characters, and the model's context is {context} tokens"
            )

    def generate(
        self, ids: list[int], write: Callable[[str], None], interruptible: bool = False
    ) -> Generation:
        """See `generate.generate`."""
        watch: Watch | GpuWatch | None = None
        if self.bytes and self.model.device.type == "cpu":
            from microscale.cli.cpu_timing import Watch

            watch = Watch(self.bytes)
        elif self.bytes:
            from microscale.cli.gpu_timing import GpuWatch

            watch = GpuWatch(self.bytes, self.model.device)
        return generate(self._decoder, self.tokenizer, ids, self.settings, write, interruptible, watch)

    def layers(self) -> list[dict[str, Any]]:
        """What runs each class of layers that were placed, and what its canary said."""
        placed = [
            (" ".join(filter(None, kind_of(path, matrix=True))), runner.format.name, runner.placement)
            for path, runner in runners(self.model)
        ]
        dense = [m for _, m in dense_modules(self.model) if isinstance(m, DenseModule)]
        placed += [("linears", m.placement.choice.problem.weight, m.placement) for m in dense]
        classes: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, weights, placement in placed:
            if placement is None:
                continue
            choice = placement.choice
            key = (name, weights, choice.backend.name, choice.refused)
            entry = classes.setdefault(
                key,
                {
                    "name": name,
                    "count": 0,
                    "format": weights,
                    "backend": choice.backend.name,
                    "how": choice.backend.how,
                    "refused": [{"backend": b, "reason": why} for b, why in choice.refused],
                    "canary": {},
                },
            )
            entry["count"] += 1
            entry["canary"][placement.proof] = entry["canary"].get(placement.proof, 0) + 1
        return list(classes.values())

    def report(self, result: Generation | None) -> str:
        """One line: what ran the layers, how fast, and how long loading took."""
        made = [f"{c['name']} by {c['backend']} ({_proofs(c)})" for c in self.layers()]
        parts = [f"{self.name} on {self.model.device}: " + (", ".join(made) or "nothing is quantised")]
        if result is not None:
            parts.append(rates(result))
            parts.append(_steps(result, device_kind(self.model.device)))
            if (count := beams(self.model)) > 1:
                parts.append(f"by one beam, of the {count} that its generation config asks for")
            if self.bytes and result.timing is None:
                parts.append("too few tokens to say where their time goes")
            if self.settings.samples(self.model):
                parts.append(f"seed {self.settings.seed}")
        parts.append(f"loaded in {self.loading:.1f} s")
        lines = ["; ".join(parts)]
        if result is not None and result.timing is not None:
            lines.append(f"  {result.timing}")
        return "\n".join(lines)


def _steps(result: Generation, device: str) -> str:
    """How its tokens were computed."""
    if device == "cpu":
        return f"steps of its modules: {result.eager}" if result.eager else "steps of one chain of kernels"
    if result.eager:
        return f"not from a graph: {result.eager}"
    if result.fused:
        return f"from a {GRAPHS[device]} of one chain of kernels"
    return f"from a {GRAPHS[device]} of its modules: {result.why_modules}"


def _proofs(layer: dict[str, Any]) -> str:
    """What the canaries said; where they differ, of how many layers, and the last in order: the largest error."""
    said: list[str] = sorted(layer["canary"])
    failed = [str(r["reason"]) for r in layer["refused"] if layer["name"] == "linears"]
    if failed:  # by rule refused ones were never placed
        return failed[0]
    return said[-1] if len(said) == 1 else f"the worst of {layer['count']} layers: {said[-1]}"


def check_ids(name: str, prompt: str) -> None:
    """That a prompt for a model without a tokenizer is token ids, before minutes go into loading the model.

    Raises:
        PromptError: it is not.
        CheckpointError: the model's config cannot be read.
    """
    path: Path = resolve(name)
    config = dummy_config(path, read_config(path), None)
    _token_ids(name, prompt, config.get_text_config().vocab_size)


def _token_ids(name: str, prompt: str, vocabulary: int) -> list[int]:
    words, longest = prompt.split(), len(str(vocabulary))
    if not all(w.isdecimal() and len(w.lstrip("0")) <= longest and int(w) < vocabulary for w in words):
        problem = "has no tokenizer, so a prompt is token ids"
        raise PromptError(f"{name} {problem} from 0 to {vocabulary - 1}, such as '17 4 96'")
    return [int(w) for w in words]


def open_session(
    name: str,
    settings: Settings,
    chat: bool | None,
    tokenizer: Any,
    *,
    timing: bool = False,
    graph: bool = True,
    **options: Any,
) -> Session:
    """Load a model. `options` go to `load`.

    Args:
        timing: generations note where a token's time goes.
        graph: see `Session`.

    Raises:
        MicroscaleError: it cannot be loaded, or `chat` is asked for and there is no chat template.
    """
    quiet_libraries()
    template = getattr(tokenizer, "chat_template", None) is not None
    if chat and not template:
        raise MicroscaleError(f"{name} has no chat template; without --chat it completes text")
    started = time.perf_counter()
    model = load(name, progress=lambda items: progress(items, "placing layers"), **options)
    loading = time.perf_counter() - started
    read = outline(name, layers=options.get("layers")).read if timing else 0
    return Session(name, model, tokenizer, settings, template if chat is None else chat, loading, read, graph)


def tokenizer_of(name: str) -> Any:
    """The tokenizer beside a checkpoint, or None where there is none. No code of the checkpoint is run.

    Raises:
        CheckpointError: there is one, and it cannot be read.
    """
    path: Path = resolve(name)
    if not any(os.path.lexists(path / file) for file in _TOKENIZER_FILES):
        return None
    for file in (*_TOKENIZER_FILES, *_BESIDE_TOKENIZERS):
        if os.path.lexists(path / file):
            open_regular(path / file).close()
    quiet_libraries()
    if (path / CONFIG).exists():  # which the tokenizer reads, too: said of it, not of the tokenizer
        config = read_config(path)
        quant_method(config, path / CONFIG)
        dummy_config(path, config, None)
    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a broken file raises: the Rust side has plain Exceptions only
        raise CheckpointError(path, f"its tokenizer cannot be read: {one_line(error)}") from error
    # transformers compares it with every prompt's length, and with nothing before.
    longest = found.model_max_length
    if not isinstance(longest, int | float):
        raise CheckpointError(
            path, "model_max_length of its tokenizer", expected="a number", found=brief(longest)
        )
    return found


def rates(result: Generation) -> str:
    """ "prompt 45 tokens at 310 tok/s, 128 new at 14.2 tok/s"."""
    ended = {"end": ", ended by the model", "interrupted": ", interrupted"}.get(result.stopped, "")
    prompt = f"prompt {len(result.prompt_ids)} tokens at {result.prefill_rate:.3g} tok/s"
    return f"{prompt}, {len(result.ids)} new at {result.decode_rate:.3g} tok/s{ended}"


def write(text: str) -> None:
    """To stdout at once; on a terminal without control characters, which a model may be made to utter."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line beside the text, on stderr."""
    say(text, style="dim", stderr=True)
