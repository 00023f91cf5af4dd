#include "pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {

namespace {

constexpr int kCountBits = 24;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;

int64_t items_of(uint64_t ticket) { return static_cast<int64_t>(ticket >> kCountBits & kCountMask); }
int64_t taken_of(uint64_t ticket) { return static_cast<int64_t>(ticket & kCountMask); }

}  // namespace

ThreadPool::ThreadPool(int32_t threads) : threads_(threads) {
  for (int32_t thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { serve(thread); });
  }
}

ThreadPool::~ThreadPool() {
  ending_.store(true, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Job& job) {
  if (threads_ == 1) {
    for (int64_t items = job.next(0); items > 0; items = job.next(0)) {
      for (int64_t item = 0; item < items; ++item) job.item(item, 0);
    }
    return;
  }
  const int64_t items = job.next(0);
  if (items == 0) return;
  job_ = &job;
  running_.store(true, std::memory_order_relaxed);
  publish(items);
  uint64_t ticket;
  while (running_.load(std::memory_order_acquire)) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (take(ticket)) {
      work(ticket, 0);
    } else if (running_.load(std::memory_order_acquire)) {
      rest(epoch);
    }
  }
}

void ThreadPool::serve(int32_t thread) {
  uint64_t ticket;
  while (!ending_.load(std::memory_order_acquire)) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (take(ticket)) {
      work(ticket, thread);
    } else if (!ending_.load(std::memory_order_acquire)) {
      rest(epoch);
    }
  }
}

bool ThreadPool::take(uint64_t& ticket) {
  ticket = ticket_.load(std::memory_order_acquire);
  while (taken_of(ticket) < items_of(ticket)) {
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

void ThreadPool::work(uint64_t ticket, int32_t thread) {
  Job& job = *job_;
  job.item(taken_of(ticket), thread);
  if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < items_of(ticket)) return;
  // The last item of its phase: nobody else holds one.
  done_.store(0, std::memory_order_relaxed);
  const int64_t items = job.next(thread);
  if (items == 0) running_.store(false, std::memory_order_release);
  publish(items);
}

void ThreadPool::publish(int64_t items) {
  const uint64_t phase = (ticket_.load(std::memory_order_relaxed) >> (2 * kCountBits)) + 1;
  ticket_.store(phase << (2 * kCountBits) | static_cast<uint64_t>(items) << kCountBits, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
}

// Until the epoch is another one.
void ThreadPool::rest(uint32_t epoch) {
  constexpr auto kSpin = std::chrono::microseconds(20);
  const auto began = std::chrono::steady_clock::now();
  for (uint32_t i = 1; epoch_.load(std::memory_order_acquire) == epoch; ++i) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (i % 64 == 0 && std::chrono::steady_clock::now() - began > kSpin) {
      epoch_.wait(epoch, std::memory_order_acquire);
      return;
    }
  }
}

}  // namespace headrace
