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

// Rows a multiple of a page apart would compete for the same few places of a cache: a product that writes 16 columns of
// each of many rows was a twentieth slower.
int32_t row_stride(int32_t width) {
  constexpr int32_t kClash = 256, kApart = 32;  // floats
  return width % kClash == 0 ? width + kApart : width;
}

}  // namespace

Workspace::Workspace(const Kernels& kernels, int32_t threads, int32_t max_tokens, int32_t head_rows,
                     const std::vector<BufferSpec>& buffers, int64_t num_phases)
    : cycles(static_cast<size_t>(num_phases)),
      kernels_(kernels),
      pool_(threads) {
  for (const BufferSpec& spec : buffers) {
    const int64_t rows = static_cast<int64_t>(spec.head ? head_rows : max_tokens) * spec.rows_a_token;
    Buffer buffer{spec.width, row_stride(spec.width), nullptr, nullptr, {}};
    const auto floats = [&buffer](int64_t count) {
      buffer.memory.emplace_back(static_cast<int64_t>(sizeof(float)) * count);
      return reinterpret_cast<float*>(buffer.memory.back().data());
    };
    buffer.values = floats(rows * buffer.stride);
    if (spec.quantised) {
      buffer.memory.emplace_back(kGroupBytes * (rows * spec.width / kGroup));
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

namespace {

// A run of a program. A phase of one item is done by whoever comes to it, at once; one of none is passed over.
class Run : public ThreadPool::Job {
 public:
  Run(const Step& step, Workspace& workspace, const std::vector<std::unique_ptr<Operation>>& operations,
      const std::vector<int32_t>& first_phases, int32_t begin, int32_t end)
      : step_(step),
        workspace_(workspace),
        operations_(operations),
        first_phases_(first_phases),
        operation_(begin),
        end_(end),
        timings_(workspace.timings),
        mark_(now()) {
    if (timings_ != nullptr) {
      timings_->make_room(static_cast<size_t>(end - begin) + 1);
      begun_ = Timings::Clock::now();
    }
    for (int32_t i = begin; i < end; ++i) operations_[static_cast<size_t>(i)]->prepare(step, workspace);
    if (timings_ != nullptr) begun_ = timings_->keep(Timings::kPrepare, step.tokens, begun_);
  }

  int64_t next(int32_t thread) override {
    if (phase_ >= 0) finished();
    for (phase_ = phase_ < 0 ? 0 : phase_; operation_ < end_; finished()) {
      const Operation& operation = *operations_[static_cast<size_t>(operation_)];
      const int64_t items = operation.items(step_, workspace_, phase_);
      if (items > 1) return items;
      if (items == 1) operation.run(step_, workspace_, phase_, 0, thread);
    }
    return 0;
  }

  void item(int64_t item, int32_t thread) override {
    operations_[static_cast<size_t>(operation_)]->run(step_, workspace_, phase_, item, thread);
  }

 private:
  void finished() {
    const uint64_t time = now();
    workspace_.cycles[static_cast<size_t>(first_phases_[static_cast<size_t>(operation_)] + phase_)] += time - mark_;
    mark_ = time;
    if (++phase_ < operations_[static_cast<size_t>(operation_)]->phases(step_)) return;
    if (timings_ != nullptr) begun_ = timings_->keep(operation_, step_.tokens, begun_);
    ++operation_;
    phase_ = 0;
  }

  const Step& step_;
  Workspace& workspace_;
  const std::vector<std::unique_ptr<Operation>>& operations_;
  const std::vector<int32_t>& first_phases_;
  int32_t operation_, phase_ = -1, end_;
  Timings* timings_;
  Timings::Clock::time_point begun_;  // where somebody profiles: when the operation began
  uint64_t mark_;
};

}  // namespace

void Program::run(const Step& step, Workspace& workspace, int32_t begin, int32_t end) const {
  Run run(step, workspace, operations_, first_phases_, begin, end);
  workspace.pool_.run(run);
}

}  // namespace headrace
