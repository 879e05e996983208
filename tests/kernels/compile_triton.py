"""Compile Triton's kernels for a GPU that need not be here, `python -m tests.kernels.compile_triton
CAPABILITY`, and print for each what was made: its name, what of it, and words that say what its code holds.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from petalite.kernels import triton_int8, triton_nf4, triton_q8

POINTERS = {
    **dict.fromkeys(("digits", "codes"), "*i8"),
    **dict.fromkeys(("factors", "scales", "levels", "table", "out"), "*fp32"),
    **dict.fromkeys(("packed", "nearest"), "*u8"),
    **dict.fromkeys(("x", "y", "bias", "hidden"), "*bf16"),
    "columns": "*i64",
}
INT8 = {"columns": "*i32"}
Q8 = {"codes": "*u8", "scales": "*fp16"}
WIDE = dict.fromkeys(("x", "y", "bias"), "*fp32")
FEW, MANY = {"TOKENS": 16, "OUT": 32}, {"TOKENS": 32, "OUT": 64}
KERNELS: list[tuple[Any, str, dict[str, Any], dict[str, str]]] = [
    (triton_int8._digits, "int8", {"BLOCKS": 16}, INT8),
    (triton_int8._product, "few", {"HAS_BIAS": True, "STAGES": 5, **FEW}, {}),
    (triton_int8._product, "many", {"HAS_BIAS": True, "STAGES": 3, "TOKENS": 64, "OUT": 64}, {}),
    (triton_nf4._product, "tf32", {"HAS_BIAS": True, "PRECISION": "tf32", **FEW}, {}),
    (triton_nf4._product, "ieee", {"HAS_BIAS": False, "PRECISION": "ieee", **MANY}, WIDE),
    (triton_q8._encode, "q8", {"BLOCKS": 16}, Q8),
    (triton_q8._decode, "q8", {"BLOCKS": 16}, Q8),
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
        print(kernel.fn.__qualname__, what, *made.asm, *holds)


if __name__ == "__main__":
    main(int(sys.argv[1]))
