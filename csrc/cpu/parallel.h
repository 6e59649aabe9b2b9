// Sharing out work: threads that start late or are held up do not keep the others waiting.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace samerge {

// Calls body(first, last) with pieces of 0 ... count, at most `piece` long, on no more threads than have `least` to do. Every
// thread goes through a range of its own, the same in every call, and then helps with the others'.
template <class Body>
void share_out(int64_t count, int64_t least, int64_t piece, const Body& body) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + least - 1) / least);
  if (threads <= 1 || at::in_parallel_region()) {
    if (count) body(int64_t(0), count);
    return;
  }
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t i = 0; i < threads; ++i) {
    ranges[i].next = count * i / threads;
    ranges[i].end = count * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t mine = from; mine < to; ++mine)
      for (int64_t i = 0; i < threads; ++i) {
        Range& range = ranges[(mine + i) % threads];
        int64_t first;
        while ((first = range.next.fetch_add(piece)) < range.end) body(first, std::min(first + piece, range.end));
      }
  });
}

// As many rows of `count` numbers as pay for a thread where a number takes no more than a read.
inline int64_t least_rows(int64_t count) {
  constexpr int64_t kLeast = 1 << 17;  // numbers
  return (kLeast + count) / (count + 1);
}

}  // namespace samerge
