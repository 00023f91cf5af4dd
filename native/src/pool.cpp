#include "pool.h"

namespace headrace {

ThreadPool::ThreadPool(int32_t threads) : threads_(threads) {
  for (int32_t thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { serve(thread); });
  }
}

ThreadPool::~ThreadPool() {
  ending_ = true;
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int32_t)>& function) {
  function_ = &function;
  if (threads_ > 1) {
    turn_.fetch_add(1, std::memory_order_release);
    turn_.notify_all();
  }
  function(0);
  barrier();
}

void ThreadPool::serve(int32_t thread) {
  for (uint32_t turn = 0;; ++turn) {
    wait_while(turn_, turn);
    if (ending_) return;
    (*function_)(thread);
    barrier();
  }
}

}  // namespace headrace
