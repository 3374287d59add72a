// Jobs cut into tasks for all threads. Results do not depend on the number of threads.
#pragma once

#include "kernels/kernels.h"

namespace bitvla {

const Kernels& active();               // at first the fastest set, or the one BITVLA_ISA names
void set_active(const Kernels& kernels);

void run_rows(const RowJob& job, size_t tokens);
void run_ternary(const TernaryJob& job, size_t tokens);
void run_linear(const LinearJob& job, size_t tokens);
void run_rope(const RopeJob& job, size_t tokens);
void run_attention(AttentionJob job);  // packs keys and values, unless they come packed
void run_append(const AttentionJob& job, size_t start);  // k and v to places start, start + 1, ... of the packed ones

// Ceilings of this machine: int8 multiply-adds of the active set on registers only (GMAC/s), memory reads (GB/s).
double peak_int8_gmacs(double seconds, int threads);
double peak_bandwidth_gbs(double seconds, size_t megabytes, int threads);

}  // namespace bitvla
