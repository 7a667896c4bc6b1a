"""A child forked from a process that has computed on several threads: it computes, and the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from microscale.machine import detect

if not hasattr(os, "fork"):
    pytest.skip("this system does not fork", allow_module_level=True)
if not detect().core:
    pytest.skip(detect().core_missing, allow_module_level=True)

SECONDS = 15  # of which a child that does not hang takes one or two

START = """
import os, signal, sys, torch, microscale
from microscale import quantize
from microscale.activations import Activation
from microscale.backends import cpu
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)  # two threads of PyTorch's

def forked(run):
    wanted = run()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # the end of one that hangs
        os._exit(0 if all(map(torch.equal, run(), wanted)) else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert all(map(torch.equal, run(), wanted)), "the parent goes on"
    assert torch.get_num_threads() == 2
    sys.exit(status)
"""

OPERATORS = """
w = cpu.pack(quantize(torch.randn(2048, 512), "mxfp4"))
w13 = cpu.pack(quantize(torch.randn(16, 4096, 64), "mxfp4"))
w2 = cpu.pack(quantize(torch.randn(16, 64, 2048), "mxfp4"))
# Large enough for PyTorch's threads where it converts and copies: biases in bf16, rows with gaps.
b13, x = torch.randn(16, 4096).bfloat16(), torch.randn(512, 200)[:, ::2].repeat_interleave(6, 1)[:, :512]
rows, ids, shares = torch.randn(4096, 64).bfloat16(), torch.randint(16, (4096, 2)), torch.rand(4096, 2)
forked(lambda: [
    cpu.linear(x, w),
    cpu.linear(torch.ones(512, 4, 512)[:, 1], w),
    cpu.moe(rows, ids, shares.bfloat16(), w13, w2, Activation("silu"), b13=b13),
])
"""

GENERATION = """
model = microscale.load("stdlib-moe", device="cpu")
ids = torch.randint(2, 200, (2, 40))
def run():
    decoder = microscale.Decoder(model)
    found = decoder.generate(ids, 8, attention_mask=torch.ones_like(ids))
    assert decoder.fused, decoder.why
    return [found, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)]
forked(run)
"""


@pytest.mark.parametrize("script", [OPERATORS, GENERATION], ids=["operators", "generation"])
def test_a_forked_child_computes(script: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", START + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
