// The C interface that cpu.py calls. Threads are OpenMP's, of the library that torch has loaded, so that they are the
// threads (and the cores) that torch and vLLM have set up.
#include <omp.h>

#include <atomic>

#include "gemm.h"
#include "head.h"
#include "quantize.h"

using morphoquant::Call;

namespace {

int run(const Call& c, bool multiply) {
  std::atomic<bool> valid{true};
#pragma omp parallel num_threads(static_cast<int>(c.threads))
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (!morphoquant::quantize(c, thread, threads)) valid.store(false, std::memory_order_relaxed);
    if (multiply) {
#pragma omp barrier
      if (valid.load(std::memory_order_relaxed)) morphoquant::gemm(c, thread, threads);
    }
  }
  return valid.load() ? 0 : 1;
}

}  // namespace

// 0, or 1 where the modality of a token that is not massive is no row: then the output is undefined.
extern "C" int morphoquant_act_quant(const Call* call) { return run(*call, false); }
extern "C" int morphoquant_linear(const Call* call) { return run(*call, true); }
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
extern "C" int64_t morphoquant_call_size() { return sizeof(Call); }
