// How attention of a step is cut into items for threads. What is computed does not depend on it (isa/attention.h).
#pragma once

#include <cstdint>
#include <vector>

#include "kv.h"

namespace headrace {

struct AttentionShape {
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t window;  // 0: all

  bool operator==(const AttentionShape&) const = default;
};

// The items of one step, for all layers of one shape. Reusing a plan for the next step allocates nothing once its
// vectors have grown.
class AttentionPlan {
 public:
  void make(const Span* spans, int32_t num_spans, const AttentionShape& shape, int32_t threads);

  // Costly items first. Threads take them one after another.
  int32_t size() const { return static_cast<int32_t>(items_.size()); }
  const AttentionItem* items() const { return items_.data(); }
  // Floats that `partials` of the work must have; 0 if nothing is split.
  int64_t partial_floats() const { return partial_floats_; }
  AttentionWork work(float* partials) { return {items_.data(), splits_.data(), partials}; }

 private:
  struct Piece;
  void add(const Piece& piece, const AttentionShape& shape, int64_t fair);
  void put(const AttentionItem& item, int64_t cost);

  std::vector<AttentionItem> items_;
  std::vector<AttentionItem> unordered_;
  std::vector<uint64_t> order_;  // cost, and place among the unordered
  std::vector<AttentionSplit> splits_;
  int64_t partial_floats_ = 0;
  int64_t partial_rows_ = 0;
};

}  // namespace headrace
