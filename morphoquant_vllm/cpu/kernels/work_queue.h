// Dynamic distribution of work over threads: a free thread takes the next range of units.
//
// Other processes of a server occupy a core for a while. With equal shares, all threads would wait for that core's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace morphoquant {

struct Range {
  int64_t begin, end;
};

// Units of work that no thread has taken yet.
class WorkQueue {
 public:
  WorkQueue(int64_t units, int64_t threads) : units_(units), threads_(threads) {}

  // The next range of units, empty if none is left. Large ranges come first, since a range is read as one stream. Small
  // ones come last, which lets threads end together.
  Range take() {
    int64_t begin = next_.load(std::memory_order_relaxed);
    int64_t size;
    do {
      size = std::min(units_ - begin, std::max<int64_t>(1, (units_ - begin) / (2 * threads_)));
    } while (size > 0 && !next_.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed));
    return {begin, begin + std::max<int64_t>(size, 0)};
  }

 private:
  const int64_t units_, threads_;
  std::atomic<int64_t> next_{0};
};

}  // namespace morphoquant
