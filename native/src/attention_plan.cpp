#include "attention_plan.h"

#include <algorithm>

namespace headrace {
namespace {

constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kLoad = 4;                 // a key costs as much to load as to meet this many queries
constexpr int64_t kSmallCost = 1024;         // not worth a thread's trip to the counter
constexpr int64_t kMaxPartialRows = 65536;     // states kept for splits, all together

}  // namespace

// Queries of a span that share their loads of keys.
struct AttentionPlan::Piece {
  int32_t span;
  int32_t query;
  int32_t queries;
  int32_t first_segment;
  int32_t end_segment;
  int64_t cost;  // of one KV head
};

void AttentionPlan::make(const Span* spans, int32_t num_spans, const AttentionShape& shape, int32_t threads) {
  items_.clear();
  unordered_.clear();
  order_.clear();
  splits_.clear();
  partial_floats_ = partial_rows_ = 0;
  const int32_t group = shape.heads / shape.kv_heads;
  const int32_t most = item_rows(group) / group;
  const auto each_piece = [&](auto&& use) {
    for (int32_t i = 0; i < num_spans; ++i) {
      const Span& span = spans[i];
      const int32_t start = span.context - span.length;
      for (int32_t query = 0; query < span.length; query += most) {
        const int32_t queries = std::min(most, span.length - query);
        const int32_t end = start + query + queries;
        const int32_t first = shape.window > 0 ? std::max(0, start + query + 1 - shape.window) : 0;
        const int64_t cost = (end - first) * (static_cast<int64_t>(queries) * group + kLoad);
        use(Piece{i, query, queries, first / kSegment, (end + kSegment - 1) / kSegment, cost});
      }
    }
  };
  int64_t total = 0;
  each_piece([&](const Piece& piece) { total += piece.cost * shape.kv_heads; });
  const int64_t fair = threads == 1 ? total : std::max(kSmallCost, total / (threads * kItemsPerThread));
  each_piece([&](const Piece& piece) { add(piece, shape, fair); });

  std::sort(order_.begin(), order_.end(), [](uint64_t a, uint64_t b) { return a > b; });
  for (const uint64_t place : order_) items_.push_back(unordered_[static_cast<uint32_t>(place)]);
}

// As many KV heads as make a fair share; one that is more than that is split by segments.
void AttentionPlan::add(const Piece& piece, const AttentionShape& shape, int64_t fair) {
  const int32_t segments = piece.end_segment - piece.first_segment;
  const int32_t parts = static_cast<int32_t>(std::min<int64_t>(segments, (piece.cost + fair - 1) / fair));
  const int32_t rows = piece.queries * (shape.heads / shape.kv_heads);
  const int64_t states = static_cast<int64_t>(segments) * rows;
  if (parts < 2 || partial_rows_ + states * shape.kv_heads > kMaxPartialRows) {
    const int64_t share = std::clamp<int64_t>(fair / piece.cost, 1, shape.kv_heads);
    for (int32_t head = 0; head < shape.kv_heads;) {
      const int32_t heads = static_cast<int32_t>(std::min<int64_t>(share, shape.kv_heads - head));
      put({piece.span, head, heads, piece.query, piece.queries, piece.first_segment, piece.end_segment, -1},
          piece.cost * heads);
      head += heads;
    }
    return;
  }
  for (int32_t head = 0; head < shape.kv_heads; ++head) {
    const int32_t split = static_cast<int32_t>(splits_.size());
    splits_.push_back({piece.first_segment, piece.end_segment, parts, parts, partial_floats_});
    partial_rows_ += states;
    partial_floats_ += states * state_floats(shape.head_dim);
    for (int32_t part = 0; part < parts; ++part) {
      const auto edge = [&](int32_t i) {
        return piece.first_segment + static_cast<int32_t>(static_cast<int64_t>(segments) * i / parts);
      };
      put({piece.span, head, 1, piece.query, piece.queries, edge(part), edge(part + 1), split}, piece.cost / parts);
    }
  }
}

void AttentionPlan::put(const AttentionItem& item, int64_t cost) {
  order_.push_back(static_cast<uint64_t>(std::min<int64_t>(cost, UINT32_MAX)) << 32 | unordered_.size());
  unordered_.push_back(item);
}

}  // namespace headrace
