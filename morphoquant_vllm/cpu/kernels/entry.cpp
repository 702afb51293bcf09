// The C interface that cpu/build.py loads. Threads come from the OpenMP library that torch has loaded: they are the
// threads, and the cores, that torch and vLLM have set up.
#include <omp.h>

#include <atomic>
#include <memory>
#include <new>

#include "experts.h"
#include "head.h"
#include "head_bfloat16.h"

using morphoquant::Call;
using morphoquant::Range;
using morphoquant::Request;

namespace {

int run(const Request& request, bool multiply) {
  Call c;
  if (!morphoquant::read(request, multiply, c)) return 2;
  // Rows and, for a product, codes and group offsets. K is a multiple of 32, so 4-byte fields are aligned.
  const int64_t offsets = multiply ? c.tokens * (c.channels / c.group_size) : 0;
  const int64_t bytes = 4 * (c.tokens + offsets) + (multiply ? c.tokens * c.channels : 0);
  const std::unique_ptr<char[]> workspace(new (std::nothrow) char[bytes]);
  if (!workspace) return 3;
  c.token_row = reinterpret_cast<int32_t*>(workspace.get());
  if (multiply) {
    c.offset = c.token_row + c.tokens;
    c.codes = reinterpret_cast<int8_t*>(c.offset + offsets);
  }
  c.unsigned_codes = multiply && morphoquant::takes_bytes(c.two_level, c.tokens);
  std::atomic<bool> valid{true};
  morphoquant::WorkQueue queue(multiply ? morphoquant::gemm_units(c) : 0, c.threads);
#pragma omp parallel num_threads(static_cast<int>(c.threads))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!morphoquant::quantize(c, thread, threads)) valid.store(false, std::memory_order_relaxed);
    if (multiply) {
#pragma omp barrier
      if (valid.load(std::memory_order_relaxed)) {
        for (Range taken = queue.take(); taken.begin < taken.end; taken = queue.take()) morphoquant::gemm(c, taken);
      }
    }
  }
  return valid.load() ? 0 : 1;
}

}  // namespace

// Return codes: 0 for success; 1 if the modality of a token that is not massive is not a row. The output is then
// undefined. 2 if a record does not fit the request; 3 if memory is exhausted.
extern "C" int morphoquant_act_quant(const Request* request) { return run(*request, false); }
extern "C" int morphoquant_linear(const Request* request) { return run(*request, true); }
extern "C" int morphoquant_experts(const morphoquant::ExpertsRequest* request) {
  try {
    return morphoquant::run_experts(*request);
  } catch (const std::bad_alloc&) {
    return 3;
  }
}
extern "C" int morphoquant_head(const morphoquant::HeadCall* call) {
  if (call->dtype == morphoquant::kFloat32) {
    morphoquant::run_head<morphoquant::kFloat32>(*call);
  } else if (call->dtype == morphoquant::kBFloat16) {
    morphoquant::run_head<morphoquant::kBFloat16>(*call);
  } else {
    morphoquant::run_head<morphoquant::kFloat16>(*call);
  }
  return 0;
}
// Whether this build and this processor have morphoquant_head_bfloat16.
extern "C" int morphoquant_has_head_bfloat16() { return morphoquant::has_head_bfloat16(); }
extern "C" int morphoquant_head_bfloat16(const morphoquant::HeadBFloat16Call* call) {
  morphoquant::run_head_bfloat16(*call);
  return 0;
}
extern "C" int64_t morphoquant_request_size() { return sizeof(Request); }
