// A model as a list of operations over a workspace, and the threads that run them.
//
//   program    made once from a ModelSpec (backends/native/program.py); holds weights and settings, is not written to
//              while it runs
//   workspace  the activations, threads and clocks of one caller: two callers with one each can run at the same time
//   run        an operation has phases, a phase has items, which go to whoever is free (pool.h); what an item computes
//              does not depend on who computes it
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pack.h"
#include "pool.h"
#include "table.h"

namespace headrace {

class Workspace;

// What the operations of one run share.
struct Step {
  int32_t tokens = 0;
  const int32_t* ids = nullptr;        // [tokens]
  const int32_t* positions = nullptr;  // [tokens]
  const int64_t* slots = nullptr;      // [tokens] where keys and values go
  const int32_t* adapters = nullptr;   // [tokens] number of the LoRA adapter or -1; null: no token has one
  const Span* spans = nullptr;
  int32_t num_spans = 0;
  const int32_t* places = nullptr;  // [tokens] for the head: which tokens of the step before it
};

class Operation {
 public:
  virtual ~Operation() = default;
  // Before a run, by one thread.
  virtual void prepare(const Step&, Workspace&) const {}
  virtual int32_t phases(const Step&) const { return 1; }
  // May depend on what earlier phases found.
  virtual int64_t items(const Step&, const Workspace&, int32_t phase) const = 0;
  virtual void run(const Step&, Workspace&, int32_t phase, int64_t item, int32_t thread) const = 0;
};

// A table of activations, a row a token.
struct BufferSpec {
  int32_t width;
  bool quantised;        // also kept as int8
  int32_t rows_a_token;  // experts: as many as a token has
  bool head;             // rows are those whose logits are wanted, not the step's tokens
};

// An operation of one run, or what a session does around it (session.h): nanoseconds of the steady clock.
struct Timing {
  int32_t operation, rows;
  int64_t begin, end;
};

// What is kept while somebody profiles.
class Timings {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int32_t kPrepare = -1, kSample = -2;  // in place of an operation's number

  // May throw; so many calls of `keep` after it do not.
  void make_room(size_t more) {
    if (all_.capacity() - all_.size() < more) all_.reserve(all_.size() + std::max(more, all_.size()));
  }
  // From `begin` to now; -> now.
  Clock::time_point keep(int32_t operation, int32_t rows, Clock::time_point begin) {
    const Clock::time_point end = Clock::now();
    all_.push_back({operation, rows, nanoseconds(begin), nanoseconds(end)});
    return end;
  }
  std::vector<Timing> take() { return std::exchange(all_, {}); }

 private:
  static int64_t nanoseconds(Clock::time_point time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
  }

  std::vector<Timing> all_;
};

// One caller's memory and threads.
class Workspace {
 public:
  Workspace(const Kernels& kernels, int32_t threads, int32_t max_tokens, int32_t head_rows,
            const std::vector<BufferSpec>& buffers, int64_t num_phases);

  float* row(int32_t buffer, int64_t row) { return buffers_[buffer].values + row * buffers_[buffer].stride; }
  int32_t width(int32_t buffer) const { return buffers_[buffer].width; }
  // Floats from a row to the next.
  int32_t stride(int32_t buffer) const { return buffers_[buffer].stride; }
  // `rows` rows from `first` on, in tiles of their own.
  QuantRows quantised(int32_t buffer, int64_t first, int64_t rows);
  ThreadPool& pool() { return pool_; }
  int32_t threads() const { return pool_.threads(); }
  const Kernels& kernels() const { return kernels_; }
  int64_t bytes() const;

  // For operations whose work is known only in the step, by their own number.
  std::vector<std::unique_ptr<struct State>> states;
  // Cycles of each phase so far: counted from the end of the one before.
  std::vector<uint64_t> cycles;
  // Where each operation's times go; null: nobody profiles.
  Timings* timings = nullptr;

 private:
  friend class Program;
  struct Buffer {
    int32_t width, stride;
    float* values;
    uint8_t* quantised;
    std::vector<Bytes> memory;
  };
  const Kernels& kernels_;
  std::vector<Buffer> buffers_;
  ThreadPool pool_;
};

// What an operation keeps in a workspace.
struct State {
  virtual ~State() = default;
};

class Program {
 public:
  explicit Program(const Kernels& kernels) : kernels_(kernels) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const Kernels& kernels() const { return kernels_; }
  int32_t add_buffer(BufferSpec spec);
  // Returns its number. `max_phases`: as many as it can have.
  int32_t add(std::unique_ptr<Operation> operation, int32_t max_phases);
  std::unique_ptr<Workspace> workspace(int32_t threads, int32_t max_tokens, int32_t head_rows) const;
  int32_t size() const { return static_cast<int32_t>(operations_.size()); }
  // Operations [begin, end).
  void run(const Step& step, Workspace& workspace, int32_t begin, int32_t end) const;
  // Where the phases of each operation begin in Workspace::cycles.
  const std::vector<int32_t>& first_phases() const { return first_phases_; }

 private:
  const Kernels& kernels_;
  std::vector<BufferSpec> buffers_;
  std::vector<std::unique_ptr<Operation>> operations_;
  std::vector<int32_t> first_phases_;
  int32_t num_phases_ = 0;
};

}  // namespace headrace
