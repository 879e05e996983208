// Products with weights that never change. Inside a team; every worker calls together with equal arguments.
#pragma once

#include "common.h"
#include "team.h"

namespace petalite {

// Shared by the workers of a call; 64-byte aligned. What it held is forgotten.
struct Scratch {
    char* data;
    size_t bytes;
};

enum class Epilogue : int32_t {
    Store = 0,     // y = W x + bias
    Add = 1,       // y += W x + bias
    SiluGate = 2,  // W is [gate; up] of n_out / 2 rows each: y (rows, n_out / 2) = silu(gate) · up.
                   // n_out / 2 must be a multiple of kPanelRows
};

// x (rows, n_in) → y (rows, n_out), strides in floats. x may be a worker's own copy, if all are equal; y is shared,
// overlaps no input, and is complete when the call returns.
//
// In INT8 and NF4 a row's result is the same to the bit for any number of workers, any rows beside it and any
// instruction set: sums of whole numbers, then float operations in a fixed order. INT8 gives the numbers of
// kernels/int8.py. In the float formats it depends on the instruction set, and on nothing else.
void linear_apply(Worker& worker, const Linear& linear, const float* x, int64_t rows, int64_t x_stride, float* y,
                  int64_t y_stride, Scratch& scratch, Epilogue epilogue = Epilogue::Store);

// Bytes that `scratch` must have at least.
size_t linear_scratch_bytes(const Linear& linear, int64_t rows);

}  // namespace petalite
