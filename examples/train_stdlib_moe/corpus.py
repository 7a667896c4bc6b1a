"""Turns the running Python's standard library into a tokenizer and token files: `python corpus.py OUT`."""

import argparse
import hashlib
import json
import platform
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 2048
CONTEXT = 1024
BOUNDARY = "<|endoftext|>"
HELDOUT_PERCENT = 1
SHIPPED_BYTES = 150_000

# Line ends take the punctuation before them and the indentation after them: "):\n        " can be one token.
PIECES = Regex(
    r"[^\s\p{L}\p{N}]*(?:[ \t\f]*\n)+[ \t]*"
    r"|[^\s\p{L}\p{N}]?\p{L}+"
    r"| \p{L}+"
    r"| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+"
    r"|\s+"
)


def read_sources(root: Path) -> dict[str, str]:
    """Relative path -> text of every distinct UTF-8 *.py file, in order of path, with "\\n" line ends."""
    texts: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        # _sysconfigdata_* is written when Python is built: it describes one machine.
        if "site-packages" in file.parts or file.name.startswith("_sysconfigdata"):
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            texts[path] = text if text.endswith("\n") else text + "\n"
    first = {text: path for path, text in reversed(texts.items())}
    return {path: text for path, text in texts.items() if first[text] == path}


def path_hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """(train, held-out) paths. The hash of the path decides, so that another Python version splits alike."""
    heldout = [p for p in texts if path_hash(p) % 100 < HELDOUT_PERCENT]
    return [p for p in texts if p not in set(heldout)], heldout


def choose_shipped(texts: dict[str, str], heldout: list[str]) -> list[str]:
    """The held-out files that go into heldout.txt: by hash, while they fit."""
    shipped, size = [], 0
    for path in sorted(heldout, key=path_hash):
        length = len((BOUNDARY + texts[path]).encode())
        if size + length <= SHIPPED_BYTES:
            shipped.append(path)
            size += length
    return shipped


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB, f"{tokenizer.get_vocab_size()=}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    tokenizer.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    # transformers 5 writes a class name that 4 does not know; both know this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tables = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(tables, ensure_ascii=False, separators=(",", ":")))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of the texts, a boundary before each."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [tokenizer.eos_token_id, *encoding.ids]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    texts = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    assert not any(BOUNDARY in text for text in texts.values())
    train, heldout = split(texts)
    shipped = choose_shipped(texts, heldout)
    tokenizer = train_tokenizer([texts[p] for p in train])
    save_tokenizer(tokenizer, out)

    shipped_text = "".join(BOUNDARY + texts[p] for p in shipped)
    (out / "heldout.txt").write_bytes(shipped_text.encode())
    shipped_ids = encode(tokenizer, [texts[p] for p in shipped])
    assert tokenizer(shipped_text)["input_ids"] == shipped_ids.tolist()

    print(f"CPython {platform.python_version()}: {len(texts)} files")
    for name, paths in (("train", train), ("heldout", heldout)):
        ids = encode(tokenizer, [texts[p] for p in paths])
        ids.tofile(out / f"{name}.bin")
        chars = sum(len(texts[p]) for p in paths)
        print(
            f"{name}: {len(paths)} files, {chars} characters, {len(ids)} tokens, {chars / len(ids):.3f} each"
        )
    print(f"heldout.txt: {len(shipped)} files, {len(shipped_text.encode())} bytes, {len(shipped_ids)} tokens")
    files = {"python": platform.python_version(), "files": heldout, "shipped": shipped}
    (out / "heldout_files.json").write_text(json.dumps(files, indent=1) + "\n")


if __name__ == "__main__":
    main()
