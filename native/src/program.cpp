#include "program.h"

#if defined(__x86_64__)
#include <x86intrin.h>
#else
#include <chrono>
#endif

namespace headrace {

namespace {

uint64_t now() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

}  // namespace

Workspace::Workspace(const Kernels& kernels, int32_t threads, int32_t max_tokens, int32_t head_rows,
                     const std::vector<BufferSpec>& buffers, int64_t num_phases)
    : cycles(static_cast<size_t>(num_phases)),
      kernels_(kernels),
      counters_(static_cast<size_t>(num_phases)),
      pool_(threads) {
  for (const BufferSpec& spec : buffers) {
    const int64_t rows = static_cast<int64_t>(spec.head ? head_rows : max_tokens) * spec.rows_a_token;
    const int64_t values = rows * spec.width;
    Buffer buffer{spec.width, nullptr, nullptr, {}};
    const auto floats = [&buffer](int64_t count) {
      buffer.memory.emplace_back(static_cast<int64_t>(sizeof(float)) * count);
      return reinterpret_cast<float*>(buffer.memory.back().data());
    };
    buffer.values = floats(values);
    if (spec.quantised) {
      buffer.memory.emplace_back(kGroupBytes * (values / kGroup));
      buffer.quantised = buffer.memory.back().data();
    }
    buffers_.push_back(std::move(buffer));
  }
}

QuantRows Workspace::quantised(int32_t index, int64_t first, int64_t rows) {
  const Buffer& buffer = buffers_[index];
  return {buffer.quantised + kGroupBytes * (buffer.width / kGroup) * first, static_cast<int32_t>(rows), buffer.width};
}

int64_t Workspace::bytes() const {
  int64_t total = 0;
  for (const Buffer& buffer : buffers_) {
    for (const Bytes& part : buffer.memory) total += part.size();
  }
  return total;
}

int32_t Program::add_buffer(BufferSpec spec) {
  buffers_.push_back(spec);
  return static_cast<int32_t>(buffers_.size()) - 1;
}

int32_t Program::add(std::unique_ptr<Operation> operation, int32_t max_phases) {
  operations_.push_back(std::move(operation));
  first_phases_.push_back(num_phases_);
  num_phases_ += max_phases;
  return size() - 1;
}

std::unique_ptr<Workspace> Program::workspace(int32_t threads, int32_t max_tokens, int32_t head_rows) const {
  auto made = std::make_unique<Workspace>(kernels_, threads, max_tokens, head_rows, buffers_, num_phases_);
  made->states.resize(operations_.size());
  return made;
}

void Program::run(const Step& step, Workspace& workspace, int32_t begin, int32_t end) const {
  struct Place {
    int32_t operation, phase;
  };
  Place place{begin, 0};
  uint64_t mark = now();
  for (int32_t i = begin; i < end; ++i) operations_[i]->prepare(step, workspace);
  for (int32_t p = first_phases_[begin]; p < (end < size() ? first_phases_[end] : num_phases_); ++p) {
    workspace.counters_[p].next.store(0, std::memory_order_relaxed);
  }
  const auto finished = [&] {
    const uint64_t time = now();
    workspace.cycles[first_phases_[place.operation] + place.phase] += time - mark;
    mark = time;
    if (++place.phase >= operations_[place.operation]->phases(step)) place = {place.operation + 1, 0};
  };
  // Phases of one item, and of none, need no other thread.
  const auto alone = [&] {
    while (place.operation < end) {
      const Operation& operation = *operations_[place.operation];
      const int64_t items = operation.items(step, workspace, place.phase);
      if (items > 1) return;
      if (items == 1) operation.run(step, workspace, place.phase, 0, 0);
      finished();
    }
  };
  alone();
  if (place.operation >= end) return;
  ThreadPool& pool = workspace.pool_;
  pool.run([&](int32_t thread) {
    while (place.operation < end) {
      const Place here = place;
      const Operation& operation = *operations_[here.operation];
      const int64_t items = operation.items(step, workspace, here.phase);
      std::atomic<int64_t>& next = workspace.counters_[first_phases_[here.operation] + here.phase].next;
      for (;;) {
        const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
        if (item >= items) break;
        operation.run(step, workspace, here.phase, item, thread);
      }
      pool.barrier([&] {
        finished();
        alone();
      });
    }
  });
}

}  // namespace headrace
