// A few threads that share the items of a job, phase after phase. An item belongs to whoever takes it first; whoever
// finishes the last item of a phase begins the next one. Nobody waits for a thread that holds no item: one that the
// system has put aside (a busy machine) costs the others nothing.
//
// A thread without work spins for at most 20 µs and then sleeps, so that an idle engine takes no time and a busy one
// loses none to the system's waking.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace headrace {

class ThreadPool {
 public:
  // What is run: phases of items, one phase after another.
  class Job {
   public:
    virtual ~Job() = default;
    // Called by one thread at a time: makes the next phase ready. Its number of items, at most 2^24 - 1; 0: all done.
    virtual int64_t next(int32_t thread) = 0;
    virtual void item(int64_t item, int32_t thread) = 0;
  };

  explicit ThreadPool(int32_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t threads() const { return threads_; }

  // Returns when the job is done; the caller is thread 0. Throws nothing, and neither may the job. One caller at a time.
  void run(Job& job);

 private:
  void serve(int32_t thread);
  bool take(uint64_t& ticket);
  void work(uint64_t ticket, int32_t thread);
  void publish(int64_t items);
  void rest(uint32_t epoch);

  int32_t threads_;
  Job* job_ = nullptr;  // read by those who hold an item: it cannot end before they are through
  // The phase's number (16 bits), its items (24) and how many of these are taken (24): one word, so that an item can
  // only be taken of the phase that it belongs to.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};  // changes with every phase: what threads without work wait for
  std::atomic<bool> running_{false};
  std::atomic<bool> ending_{false};
  std::vector<std::thread> workers_;
};

// Calls function(begin, end, thread) for parts of 0 … count of `grain` each, but the last.
template <class Function>
void parallel_for(ThreadPool& pool, int64_t count, int64_t grain, const Function& function) {
  class Parts : public ThreadPool::Job {
   public:
    Parts(int64_t count, int64_t grain, const Function& function) : count_(count), grain_(grain), function_(function) {}
    int64_t next(int32_t) override {
      const int64_t parts = left_ ? (count_ + grain_ - 1) / grain_ : 0;
      left_ = false;
      return parts;
    }
    void item(int64_t item, int32_t thread) override {
      const int64_t begin = item * grain_;
      function_(begin, begin + grain_ < count_ ? begin + grain_ : count_, thread);
    }

   private:
    int64_t count_, grain_;
    const Function& function_;
    bool left_ = true;
  } parts(count, grain, function);
  pool.run(parts);
}

}  // namespace headrace
