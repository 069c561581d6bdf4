// For the sources that are compiled once per dtype, with FRD_DTYPE defined as f32, f64, f16 or bf16.
#pragma once

// FRD_OF_DTYPE(name): name_f32, ...
#define FRD_JOIN(name, dtype) name##_##dtype
#define FRD_JOIN_EXPANDED(name, dtype) FRD_JOIN(name, dtype)
#define FRD_OF_DTYPE(name) FRD_JOIN_EXPANDED(name, FRD_DTYPE)
