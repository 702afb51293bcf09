// Upper limits of the machine in the run that measures the kernels: byte dot products, and reading memory.
#include <omp.h>

#include "dot.h"

using morphoquant::Dot;

// `rounds` times 12 independent dot products of registers per thread; returns the multiply-adds done by all threads.
extern "C" double dot_products(int64_t rounds, int64_t threads) {
  double done = 0;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : done)
  {
    const Dot::Ints weights = Dot::broadcast(0x01020304), codes = Dot::broadcast(0x04030201);
    Dot::Ints a = Dot::broadcast(0), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
    const auto step = [&](auto&... sums) { ((sums = Dot::dot(sums, weights, codes)), ...); };
    for (int64_t round = 0; round < rounds; ++round) {
      // Named, not an array: the compiler keeps an array that assembly changes in memory. That each changes keeps it
      // from doing one product instead of twelve equal ones.
      step(a, b, c, d, e, f, g, h, i, j, k, l);
      asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f));
      asm volatile("" : "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
    }
    done += static_cast<double>(rounds) * 12 * Dot::kWidth * 4;
  }
  return done;
}

// Reads `bytes`, a multiple of 64, once; the result only keeps the compiler from leaving it out.
extern "C" int64_t read_memory(const uint8_t* data, int64_t bytes, int64_t threads) {
  int64_t kept = 0;
  const int64_t lines = bytes / 64;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : kept)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    constexpr int kLoads = 64 / (Dot::kWidth * 4);
    for (int64_t line = lines * thread / count; line < lines * (thread + 1) / count; ++line) {
#pragma GCC unroll 2
      for (int i = 0; i < kLoads; ++i) {
        auto value = Dot::load(data + line * 64 + i * Dot::kWidth * 4);
        asm volatile("" : "+v"(value));
      }
    }
    kept += thread;
  }
  return kept;
}
