// A few threads that run one function together, again and again. Between two runs, and at a barrier, a thread spins for
// at most 20 µs and then sleeps, so that an idle engine takes no time and a busy one loses none to the system's waking.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {

// Waits until `word` is no longer `old`.
inline void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
  constexpr auto kSpin = std::chrono::microseconds(20);
  const auto began = std::chrono::steady_clock::now();
  for (uint32_t i = 1; word.load(std::memory_order_acquire) == old; ++i) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (i % 64 == 0 && std::chrono::steady_clock::now() - began > kSpin) {
      word.wait(old, std::memory_order_acquire);
      return;
    }
  }
}

class ThreadPool {
 public:
  explicit ThreadPool(int32_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t threads() const { return threads_; }

  // Runs function(thread) on every thread, this one as number 0; returns when all are through. The function throws
  // nothing. One caller at a time.
  void run(const std::function<void(int32_t)>& function);

  // Inside run(): returns once every thread has come here, and the last of them has called `between`.
  template <class Between>
  void barrier(const Between& between) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      between();
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_while(phase_, phase);
    }
  }

 private:
  void serve(int32_t thread);
  void barrier() {
    barrier([] {});
  }

  int32_t threads_;
  const std::function<void(int32_t)>* function_ = nullptr;
  alignas(64) std::atomic<uint32_t> turn_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int32_t> arrived_{0};
  bool ending_ = false;
  std::vector<std::thread> workers_;
};

// Calls function(begin, end) for parts of 0 … count, on all threads; parts go to whoever is free.
template <class Function>
void parallel_for(ThreadPool& pool, int64_t count, int64_t grain, const Function& function) {
  std::atomic<int64_t> next{0};
  pool.run([&](int32_t) {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      function(begin, begin + grain < count ? begin + grain : count);
    }
  });
}

}  // namespace headrace
