"""Compile Triton's kernels for a GPU that need not be here, `python -m tests.kernels.compile_triton
CAPABILITY`, and print for each what was made: its name, what of it, and words that say what its code holds,
and the shared memory it takes.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from petalite.kernels import triton_attention, triton_int8, triton_nf4, triton_q8

POINTERS = {
    **dict.fromkeys(("digits", "codes"), "*i8"),
    **dict.fromkeys(("factors", "scales", "levels", "table", "out"), "*fp32"),
    **dict.fromkeys(("packed", "nearest"), "*u8"),
    **dict.fromkeys(("x", "y", "bias", "hidden"), "*bf16"),
    "columns": "*i32",
}
NF4 = {"levels": "*i8"}
Q8 = {"codes": "*u8", "scales": "*fp16"}
WIDE = dict.fromkeys(("x", "y", "bias"), "*fp32")
FEW, MANY = {"TOKENS": 16, "OUT": 32}, {"TOKENS": 32, "OUT": 64}
HEADS = {"N_HEADS": 32, "N_KV_HEADS": 8, "D": 128, "PADDED_D": 128}
ATTENTION = {"places": "*i64", "sums": "*fp32", "weights": "*fp32", "slopes": "*fp32", "scale": "fp32"}


def attention(dtype: torch.dtype, window: int, alibi: bool) -> dict[str, Any]:
    group, kv_heads = (1, 32) if alibi else (4, 8)
    tiling = triton_attention.tiling(group, 128, dtype)
    absent = {} if alibi else {"slopes": None}
    return {**HEADS, **tiling, "N_KV_HEADS": kv_heads, "WINDOW": window, **absent}


KERNELS: list[tuple[Any, str, dict[str, Any], dict[str, str]]] = [
    (triton_int8._digits, "int8", {"BLOCKS": 16}, {}),
    (triton_int8._product, "few", {"STAGES": 5, **FEW}, {}),
    (triton_int8._product, "many", {"STAGES": 3, "TOKENS": 64, "OUT": 64}, {}),
    (triton_nf4._product, "nf4_few", FEW, NF4),
    (triton_nf4._product, "nf4_many", {"bias": None, **MANY}, NF4 | WIDE),
    (triton_q8._encode, "q8", {"BLOCKS": 16}, Q8),
    (triton_q8._decode, "q8", {"BLOCKS": 16}, Q8),
    (triton_attention._append, "heads", HEADS, ATTENTION | {"heads": "*bf16"}),
    (
        triton_attention._attend,
        "tf32",
        attention(torch.bfloat16, 4096, False),
        ATTENTION | {"heads": "*bf16"},
    ),
    (triton_attention._attend, "alibi", attention(torch.float16, 0, True), ATTENTION | {"heads": "*fp16"}),
    (triton_attention._attend, "ieee", attention(torch.float32, 0, False), ATTENTION | {"heads": "*fp32"}),
    (triton_attention._merge, "heads", {"D": 128, "PADDED_D": 128, "PARTS": 16}, ATTENTION),
]


def main(capability: int) -> None:
    for kernel, what, constants, types in KERNELS:
        known = POINTERS | types
        signature = {
            name: "constexpr" if name in constants else known.get(name, "i32") for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        options = {"enable_fp_fusion": kernel is triton_nf4._product}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        code = made.asm["ptx"]
        holds = [word for word in ("mma", "div.full") if word in code]
        if re.search(r"cp\.async\.c.*, 0x10,", code):
            holds.append("wide")  # memory is copied 16 bytes at a time
        print(kernel.fn.__qualname__, what, *made.asm, *holds, made.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]))
