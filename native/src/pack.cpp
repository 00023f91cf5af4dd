#include "pack.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>

#include "half.h"

namespace headrace {

namespace {

constexpr int32_t kSuper = 256;  // columns of a K block

int64_t number_bytes(Codes codes) { return codes == Codes::f32 ? 4 : 2; }

int32_t panels_of(int32_t rows) { return (rows + kPanel - 1) / kPanel; }

int64_t panel_bytes(const Weight& weight) {
  if (weight.scales == Scales::none) return kPanel * number_bytes(weight.codes) * weight.columns;
  const int64_t groups = weight.columns / kGroup;
  const int64_t blocks = (groups + weight.groups - 1) / weight.groups;
  return blocks * header_bytes(weight.scales) + groups * (group_header_bytes(weight.scales) + code_bytes(weight.codes));
}

std::unique_ptr<PackedWeight> make(Packer& packer, Weight weight, const std::string& scheme) {
  weight.panel_bytes = panel_bytes(weight);
  Piece bytes = packer.take(weight.panel_bytes * panels_of(weight.rows));
  weight.data = bytes.data();
  return std::unique_ptr<PackedWeight>(new PackedWeight{weight, std::move(bytes), scheme});
}

float number(Codes type, const uint8_t* p) {
  if (type == Codes::f32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return type == Codes::f16 ? half_value(bits) : bf16_value(bits);
}

// What a group of 32 columns of one row is: its codes, and what scales them.
struct Group {
  std::array<uint8_t, kGroup> codes;
  float scale, minimum;             // single, singles
  uint16_t half, half_minimum;      // half, halves; d and e of k4, d of k6
  std::array<uint8_t, 2> own;       // s and m of k4, the two s of k6
};

using ReadGroup = std::function<void(int32_t row, int32_t group, Group& out)>;

void put_half(uint8_t* at, int32_t lane, uint16_t bits) { std::memcpy(at + 2 * lane, &bits, sizeof bits); }
void put_single(uint8_t* at, int32_t lane, float x) { std::memcpy(at + 4 * lane, &x, sizeof x); }

void put_header(Scales scales, uint8_t* at, int32_t lane, const Group& group) {
  switch (scales) {
    case Scales::half: case Scales::k6: put_half(at, lane, group.half); return;
    case Scales::halves: case Scales::k4:
      put_half(at, lane, group.half);
      put_half(at + 2 * kPanel, lane, group.half_minimum);
      return;
    case Scales::single: put_single(at, lane, group.scale); return;
    case Scales::singles:
      put_single(at, lane, group.scale);
      put_single(at + 4 * kPanel, lane, group.minimum);
      return;
    case Scales::none: return;
  }
}

void put_codes(Codes codes, uint8_t* at, int32_t lane, const std::array<uint8_t, kGroup>& values) {
  if (codes == Codes::q8) {
    for (int32_t step = 0; step < 8; ++step) std::memcpy(at + 64 * step + 4 * lane, &values[4 * step], 4);
    return;
  }
  std::array<uint8_t, 16> low;
  for (int32_t i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>((values[i] & 15) | (values[16 + i] & 15) << 4);
  for (int32_t step = 0; step < 4; ++step) std::memcpy(at + 64 * step + 4 * lane, &low[4 * step], 4);
  if (codes == Codes::q4) return;
  for (int32_t half = 0; half < 2; ++half) {
    for (int32_t i = 0; i < 4; ++i) {
      uint8_t packed = 0;
      for (int32_t step = 0; step < 4; ++step) packed |= (values[16 * half + 4 * step + i] >> 4 & 3) << (2 * step);
      at[256 + 64 * half + 4 * lane + i] = packed;
    }
  }
}

// Adds the work on a weight's panels, whose memory stays until that is done.
void add_panels(Packer& packer, const PackedWeight& packed, std::function<void(int64_t panel, uint8_t* out)> work,
                std::function<void()> last = {}) {
  const auto part = [piece = packed.bytes, out = packed.weight.data, bytes = packed.weight.panel_bytes,
                     work = std::move(work)](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) work(panel, const_cast<uint8_t*>(out) + panel * bytes);
  };
  packer.add(panels_of(packed.weight.rows), 4, packed.bytes.size(), part, std::move(last));
}

// Rows beyond the last are zeros: their scales are.
void fill(Packer& packer, const PackedWeight& packed, const ReadGroup& read, std::function<void()> last = {}) {
  const auto work = [weight = packed.weight, read](int64_t panel, uint8_t* at) {
    const int32_t groups = weight.columns / kGroup;
    const int64_t each = group_header_bytes(weight.scales) + code_bytes(weight.codes);
    const int32_t first = static_cast<int32_t>(panel) * kPanel;
    const int32_t lanes = std::min(kPanel, weight.rows - first);
    Group group{};
    for (int32_t start = 0; start < groups; start += weight.groups) {
      uint8_t* header = at;
      at += header_bytes(weight.scales);
      const int32_t stop = std::min(groups, start + weight.groups);
      for (int32_t g = start; g < stop; ++g, at += each) {
        for (int32_t lane = 0; lane < lanes; ++lane) {
          read(first + lane, g, group);
          if (g == start) put_header(weight.scales, header, lane, group);
          if (group_header_bytes(weight.scales)) {
            at[lane] = group.own[0];
            at[kPanel + lane] = group.own[1];
          }
          put_codes(weight.codes, at + group_header_bytes(weight.scales), lane, group.codes);
        }
      }
    }
  };
  add_panels(packer, packed, work, std::move(last));
}

// ---------------------------------------------------------------- GGUF

const uint8_t* at(const Plane& plane, int32_t row, int32_t group) {
  return plane.data + row * plane.row_stride + group * plane.group_stride;
}

uint16_t half_at(const Plane& plane, int32_t row, int32_t group) {
  uint16_t bits;
  std::memcpy(&bits, at(plane, row, group), sizeof bits);
  return bits;
}

void nibbles(const uint8_t* q, std::array<uint8_t, kGroup>& codes) {
  for (int32_t i = 0; i < 16; ++i) {
    codes[i] = q[i] & 15;
    codes[16 + i] = q[i] >> 4;
  }
}

void fifth_bits(const uint8_t* h, std::array<uint8_t, kGroup>& codes) {
  for (int32_t i = 0; i < kGroup; ++i) codes[i] |= (h[i / 8] >> (i % 8) & 1) << 4;
}

// The six-bit scale and minimum of the g-th eighth of a K block (12 bytes hold eight of each).
std::array<uint8_t, 2> six_bits(const uint8_t* s, int32_t g) {
  if (g < 4) return {static_cast<uint8_t>(s[g] & 63), static_cast<uint8_t>(s[g + 4] & 63)};
  return {static_cast<uint8_t>((s[g + 4] & 15) | (s[g - 4] >> 6) << 4),
          static_cast<uint8_t>((s[g + 4] >> 4) | (s[g] >> 6) << 4)};
}

// The two six-bit scales, less 32, of the g-th eighth of a q3_K block.
std::array<uint8_t, 2> three_bit_scales(const uint8_t* s, int32_t g) {
  std::array<uint8_t, 2> out;
  for (int32_t i = 0; i < 2; ++i) {
    const int32_t j = 2 * g + i;
    const int32_t low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
    const int32_t high = s[8 + j % 4] >> (2 * (j / 4)) & 3;
    out[i] = static_cast<uint8_t>(static_cast<int8_t>((low | high << 4) - 32));
  }
  return out;
}

struct Kind {
  Codes codes;
  Scales scales;
  int32_t zero;
  int32_t block;                // columns
  std::vector<int64_t> record;  // bytes of each plane of a block
};

std::optional<Kind> kind_of(const std::string& scheme) {
  if (scheme == "q4_0") return Kind{Codes::q4, Scales::half, 8, kGroup, {2, 16}};
  if (scheme == "q4_1") return Kind{Codes::q4, Scales::halves, 0, kGroup, {2, 2, 16}};
  if (scheme == "q5_0") return Kind{Codes::q8, Scales::half, 16, kGroup, {2, 4, 16}};
  if (scheme == "q5_1") return Kind{Codes::q8, Scales::halves, 0, kGroup, {2, 2, 4, 16}};
  if (scheme == "q8_0") return Kind{Codes::q8, Scales::half, 128, kGroup, {2, 32}};
  if (scheme == "q3_K") return Kind{Codes::q8, Scales::k6, 4, kSuper, {32, 64, 12, 2}};
  if (scheme == "q4_K") return Kind{Codes::q4, Scales::k4, 0, kSuper, {2, 2, 12, 128}};
  if (scheme == "q5_K") return Kind{Codes::q8, Scales::k4, 0, kSuper, {2, 2, 12, 32, 128}};
  if (scheme == "q6_K") return Kind{Codes::q6, Scales::k6, 32, kSuper, {128, 64, 16, 2}};
  return std::nullopt;
}

ReadGroup reader(const std::string& scheme, const std::vector<Plane>& p) {
  if (scheme == "q4_0" || scheme == "q4_1") {
    const bool minimum = scheme == "q4_1";
    return [p, minimum](int32_t n, int32_t g, Group& out) {
      out.half = half_at(p[0], n, g);
      if (minimum) out.half_minimum = half_at(p[1], n, g);
      nibbles(at(p[minimum ? 2 : 1], n, g), out.codes);
    };
  }
  if (scheme == "q5_0" || scheme == "q5_1") {
    const bool minimum = scheme == "q5_1";
    return [p, minimum](int32_t n, int32_t g, Group& out) {
      out.half = half_at(p[0], n, g);
      if (minimum) out.half_minimum = half_at(p[1], n, g);
      nibbles(at(p[minimum ? 3 : 2], n, g), out.codes);
      fifth_bits(at(p[minimum ? 2 : 1], n, g), out.codes);
    };
  }
  if (scheme == "q8_0") {
    return [p](int32_t n, int32_t g, Group& out) {
      out.half = half_at(p[0], n, g);
      const uint8_t* q = at(p[1], n, g);
      for (int32_t i = 0; i < kGroup; ++i) out.codes[i] = q[i] ^ 0x80;
    };
  }
  if (scheme == "q4_K" || scheme == "q5_K") {
    const bool fifth = scheme == "q5_K";
    return [p, fifth](int32_t n, int32_t g, Group& out) {
      const int32_t block = g / 8, part = g % 8;
      out.half = half_at(p[0], n, block);
      out.half_minimum = half_at(p[1], n, block);
      out.own = six_bits(at(p[2], n, block), part);
      const uint8_t* q = at(p[fifth ? 4 : 3], n, block) + 32 * (part / 2);
      for (int32_t i = 0; i < kGroup; ++i) out.codes[i] = q[i] >> (4 * (part % 2)) & 15;
      if (!fifth) return;
      const uint8_t* h = at(p[3], n, block);
      for (int32_t i = 0; i < kGroup; ++i) out.codes[i] |= (h[i] >> part & 1) << 4;
    };
  }
  if (scheme == "q3_K") {
    return [p](int32_t n, int32_t g, Group& out) {
      const int32_t block = g / 8, part = g % 8;
      const uint8_t* h = at(p[0], n, block);
      const uint8_t* q = at(p[1], n, block) + 32 * (part / 4);
      out.own = three_bit_scales(at(p[2], n, block), part);
      out.half = half_at(p[3], n, block);
      for (int32_t i = 0; i < kGroup; ++i) {
        out.codes[i] = static_cast<uint8_t>((q[i] >> (2 * (part % 4)) & 3) | (h[i] >> part & 1) << 2);
      }
    };
  }
  return [p](int32_t n, int32_t g, Group& out) {  // q6_K
    const int32_t block = g / 8, part = g % 8;
    // Each half block of 128: low nibbles of 64 bytes, then high ones; 32 bytes of upper bits, 2 a quarter.
    const uint8_t* q = at(p[0], n, block) + 64 * (part / 4) + 32 * (part % 2);
    const uint8_t* h = at(p[1], n, block) + 32 * (part / 4);
    const uint8_t* s = at(p[2], n, block) + 2 * part;
    out.half = half_at(p[3], n, block);
    out.own = {s[0], s[1]};
    for (int32_t i = 0; i < kGroup; ++i) {
      const int32_t low = part % 4 < 2 ? q[i] & 15 : q[i] >> 4;
      out.codes[i] = static_cast<uint8_t>(low | (h[i] >> (2 * (part % 4)) & 3) << 4);
    }
  };
}

int32_t stored_row(const std::vector<int64_t>& order, int32_t row) {
  return order.empty() ? row : static_cast<int32_t>(order[static_cast<size_t>(row)]);
}

// q4_0, q4_1 and q8_0: scales and codes lie as panels hold them (q8_0's but for the sign), four codes a word;
// only their order is another. As `fill`, but words are moved as they are.
void fill_words(Packer& packer, const PackedWeight& packed, const std::vector<Plane>& planes,
                const std::vector<int64_t>& order, std::function<void()> last) {
  const auto work = [weight = packed.weight, planes, order](int64_t panel, uint8_t* out) {
    const Plane& codes = planes.back();
    const size_t halves = planes.size() - 1;
    const int32_t steps = code_bytes(weight.codes) / (4 * kPanel);
    const uint32_t flip = weight.codes == Codes::q8 ? 0x80808080u : 0;
    const int32_t first = static_cast<int32_t>(panel) * kPanel;
    const int32_t lanes = std::min(kPanel, weight.rows - first);
    std::array<int32_t, kPanel> row;
    for (int32_t lane = 0; lane < lanes; ++lane) row[lane] = stored_row(order, first + lane);
    for (int32_t g = 0; g < weight.columns / kGroup; ++g) {
      for (size_t h = 0; h < halves; ++h, out += 2 * kPanel) {
        for (int32_t lane = 0; lane < lanes; ++lane) put_half(out, lane, half_at(planes[h], row[lane], g));
      }
      for (int32_t lane = 0; lane < lanes; ++lane) {
        const uint8_t* from = at(codes, row[lane], g);
        for (int32_t step = 0; step < steps; ++step) {
          uint32_t word;
          std::memcpy(&word, from + 4 * step, sizeof word);
          word ^= flip;
          std::memcpy(out + 4 * kPanel * step + 4 * lane, &word, sizeof word);
        }
      }
      out += code_bytes(weight.codes);
    }
  };
  add_panels(packer, packed, work, std::move(last));
}

// The pages of a file in which these planes lie, with those around them that the system maps at the same time: who asks
// for them gets them again.
void give_back(const std::vector<Plane>& planes, std::span<const uint8_t> file) {
  constexpr uintptr_t kAround = 1 << 16;
  const auto start = reinterpret_cast<uintptr_t>(file.data());  // of a page: the file is mapped from its first byte
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (const Plane& plane : planes) {
    if (plane.rows == 0 || plane.groups == 0) return;
    const auto first = reinterpret_cast<uintptr_t>(plane.data);
    const int64_t size = (plane.rows - 1) * plane.row_stride + (plane.groups - 1) * plane.group_stride + plane.bytes;
    begin = std::min(begin, first);
    end = std::max(end, first + static_cast<uintptr_t>(size));
  }
  if (begin < start || end > start + file.size()) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  begin = std::max(start, begin - std::min(begin, kAround)) / page * page;
  end = std::min(start + file.size(), end + kAround);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

// ---------------------------------------------------------------- rounding

constexpr float kMostHalf = 65504.0f;
constexpr uint16_t kHalfNaN = 0x7E00;

// The least half ≥ x, for 0 ≤ x ≤ kMostHalf.
uint16_t half_above(float x) {
  const uint16_t bits = half_bits(x);
  return half_value(bits) < x ? bits + 1 : bits;
}

// The greatest half ≤ x, for |x| ≤ kMostHalf.
uint16_t half_below(float x) {
  const uint16_t bits = half_bits(x);
  if (half_value(bits) <= x) return bits;
  return bits & 0x8000u ? bits + 1 : bits - 1;
}

// Rounds a group to 8 bits, or to 4 bits and a minimum; `single`: with scales of float32. False where f16 cannot hold
// them. A group with a number that is not finite gets a scale that is not: so do the products it takes part in.
bool round_group(const std::array<float, kGroup>& x, bool eight, bool single, Group& out) {
  out.codes.fill(eight ? 128 : 0);
  out.minimum = 0.0f;
  out.half_minimum = 0;
  if (!std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); })) {
    out.scale = std::numeric_limits<float>::quiet_NaN();
    out.half = kHalfNaN;
    return true;
  }
  const auto [least, most] = std::minmax_element(x.begin(), x.end());
  if (!eight) out.minimum = *least;
  if (!single) {
    if (std::fabs(out.minimum) > kMostHalf) return false;
    out.half_minimum = half_below(out.minimum);
    out.minimum = half_value(out.half_minimum);
  }
  // Halved first: the range of two large numbers may be infinite.
  out.scale = eight ? std::max(std::fabs(*least), std::fabs(*most)) / 127.0f
                    : (0.5f * *most - 0.5f * out.minimum) / 7.5f;
  if (!single) {
    if (out.scale > kMostHalf) return false;
    out.half = half_above(out.scale);  // upwards, so that no number lies outside the codes
    out.scale = half_value(out.half);
  }
  if (out.scale < std::numeric_limits<float>::min()) return true;  // the inverse of a smaller one may be infinite
  const float inverse = 1.0f / out.scale;
  for (int32_t i = 0; i < kGroup; ++i) {
    const float code = std::nearbyint((x[i] - out.minimum) * inverse) + (eight ? 128.0f : 0.0f);
    out.codes[i] = static_cast<uint8_t>(std::clamp(code, eight ? 1.0f : 0.0f, eight ? 255.0f : 15.0f));
  }
  return true;
}

}  // namespace

// ---------------------------------------------------------------- memory

#if defined(HEADRACE_SANITIZE)

// Each weight by itself and on the heap, so that reading one byte too far is seen.
constexpr int64_t kChunk = 0;
constexpr std::align_val_t kAlignment{64};

Bytes::Bytes(int64_t size, bool) : size_(size) {
  const size_t length = static_cast<size_t>(size);
  data_ = std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(::operator new(length, kAlignment)), Free{size});
  std::memset(data_.get(), 0, length);
}

void Bytes::Free::operator()(uint8_t* p) const { ::operator delete(p, kAlignment); }

#else

constexpr int64_t kChunk = int64_t{64} << 20;

Bytes::Bytes(int64_t size, bool huge) : size_(size) {
  const size_t length = static_cast<size_t>(std::max<int64_t>(size, 1));
  void* p = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (huge) madvise(p, length, MADV_HUGEPAGE);
  data_ = std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(p), Free{static_cast<int64_t>(length)});
}

void Bytes::Free::operator()(uint8_t* p) const { munmap(p, static_cast<size_t>(size)); }

#endif

Piece Packer::take(int64_t size) {
  constexpr int64_t kLine = 64;
  if (chunk_ == nullptr || used_ + size > chunk_->size()) {
    chunk_ = std::make_shared<Bytes>(std::max(size, kChunk), true);
    used_ = 0;
  }
  Piece piece(chunk_, used_, size);
  used_ += (size + kLine - 1) / kLine * kLine;
  return piece;
}

// ---------------------------------------------------------------- threads

Packer::Packer(int32_t threads) {
  for (int32_t thread = 1; thread < threads; ++thread) workers_.emplace_back([this] { serve(); });
}

Packer::~Packer() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    queue_.clear();
  }
  added_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Packer::add(int64_t count, int64_t grain, int64_t size, Work work, std::function<void()> last) {
  if (count == 0) return;
  auto task = std::make_shared<Task>(Task{count, grain, size, std::move(work), std::move(last)});
  std::unique_lock lock(mutex_);
  queue_.push_back(std::move(task));
  waiting_ += size;
  added_.notify_all();
  while (waiting_ > kMostBehind && step(lock)) {
  }
}

void Packer::finish() {
  std::unique_lock lock(mutex_);
  while (step(lock)) {
  }
  done_.wait(lock, [this] { return waiting_ == 0; });
}

// Does the next part, if there is one, without the lock.
bool Packer::step(std::unique_lock<std::mutex>& lock) {
  if (queue_.empty()) return false;
  const std::shared_ptr<Task> task = queue_.front();
  const int64_t begin = task->next, end = std::min(task->count, begin + task->grain);
  task->next = end;
  if (end == task->count) queue_.pop_front();
  lock.unlock();
  task->work(begin, end);
  lock.lock();
  task->done += end - begin;
  if (task->done < task->count) return true;
  if (task->last) {
    lock.unlock();
    task->last();
    lock.lock();
  }
  waiting_ -= task->size;
  if (waiting_ == 0) done_.notify_all();
  return true;
}

void Packer::serve() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    if (!step(lock)) added_.wait(lock, [this] { return ending_ || !queue_.empty(); });
  }
}

// ---------------------------------------------------------------- packing

std::unique_ptr<PackedWeight> pack_numbers(Packer& packer, Codes from, Codes to, Plane data, int32_t rows,
                                           int32_t columns) {
  auto packed = make(packer, Weight{nullptr, 0, rows, columns, to, Scales::none, 1, 0}, from == to ? "" : "rounded");
  const int64_t in_bytes = number_bytes(from), out_bytes = number_bytes(to);
  add_panels(packer, *packed, [=](int64_t panel, uint8_t* out) {
    const int32_t lanes = std::min<int32_t>(kPanel, rows - static_cast<int32_t>(panel) * kPanel);
    for (int32_t lane = 0; lane < lanes; ++lane) {
      const uint8_t* row = data.data + (panel * kPanel + lane) * data.row_stride;
      for (int32_t k = 0; k < columns; ++k) {
        uint8_t* place = out + out_bytes * (static_cast<int64_t>(kPanel) * k + lane);
        if (from == to) {
          std::memcpy(place, row + in_bytes * k, static_cast<size_t>(out_bytes));
          continue;
        }
        const float x = number(from, row + in_bytes * k);
        const uint16_t bits = to == Codes::f16 ? half_bits(x) : bf16_bits(x);
        if (to == Codes::f32) {
          std::memcpy(place, &x, sizeof x);
        } else {
          std::memcpy(place, &bits, sizeof bits);
        }
      }
    }
  });
  packer.finish();
  return packed;
}

std::unique_ptr<PackedWeight> pack_blocks(Packer& packer, const std::string& scheme, const std::vector<Plane>& planes,
                                          const std::vector<int64_t>& order, int32_t rows, int32_t columns,
                                          std::span<const uint8_t> file) {
  const std::optional<Kind> kind = kind_of(scheme);
  if (!kind || columns % kind->block) return nullptr;
  const int64_t stored = planes.empty() ? 0 : planes[0].rows;
  const int64_t found = order.empty() ? stored : static_cast<int64_t>(order.size());
  bool fits = planes.size() == kind->record.size() && found == rows;
  for (size_t i = 0; fits && i < planes.size(); ++i) {
    fits = planes[i].rows == stored && planes[i].groups == columns / kind->block && planes[i].bytes == kind->record[i];
  }
  for (const int64_t row : order) fits = fits && 0 <= row && row < stored;
  if (!fits) throw std::invalid_argument("these are not the planes of a " + scheme + " tensor of this shape");
  auto packed =
      make(packer, Weight{nullptr, 0, rows, columns, kind->codes, kind->scales, kind->block / kGroup, kind->zero}, scheme);
  std::function<void()> last;
  if (!file.empty()) last = [planes, file] { give_back(planes, file); };
  if (scheme == "q4_0" || scheme == "q4_1" || scheme == "q8_0") {
    fill_words(packer, *packed, planes, order, std::move(last));
    return packed;
  }
  ReadGroup read = reader(scheme, planes);
  if (!order.empty()) {
    read = [read, order](int32_t n, int32_t g, Group& out) { read(stored_row(order, n), g, out); };
  }
  fill(packer, *packed, read, std::move(last));
  return packed;
}

std::unique_ptr<PackedWeight> pack_scaled(Packer& packer, int32_t bits, const uint8_t* codes, const float* scales,
                                          const float* minima, int32_t zero, int32_t group, int32_t rows,
                                          int32_t columns) {
  const Scales kind = minima == nullptr ? Scales::single : Scales::singles;
  const Codes type = bits == 4 ? Codes::q4 : Codes::q8;
  auto packed = make(packer, Weight{nullptr, 0, rows, columns, type, kind, group / kGroup, zero},
                     bits == 4 ? "int4" : "int8");
  const int64_t each = columns / group;
  fill(packer, *packed, [&](int32_t n, int32_t g, Group& out) {
    const int64_t place = n * each + g / (group / kGroup);
    out.scale = scales[place];
    if (minima != nullptr) out.minimum = minima[place];
    std::memcpy(out.codes.data(), codes + static_cast<int64_t>(n) * columns + kGroup * g, kGroup);
  });
  packer.finish();
  return packed;
}

std::unique_ptr<PackedWeight> quantise_numbers(Packer& packer, int32_t bits, Codes from, Plane data, int32_t rows,
                                               int32_t columns) {
  const bool eight = bits == 8;
  const int64_t bytes = number_bytes(from);
  const auto rounded = [&](bool single) -> std::unique_ptr<PackedWeight> {
    const Scales scales = eight ? (single ? Scales::single : Scales::half) : (single ? Scales::singles : Scales::halves);
    auto packed = make(packer, Weight{nullptr, 0, rows, columns, eight ? Codes::q8 : Codes::q4, scales, 1, eight ? 128 : 0},
                       eight ? "int8 at load" : "int4 at load");
    std::atomic<bool> fits{true};
    fill(packer, *packed, [&](int32_t n, int32_t g, Group& out) {
      const uint8_t* row = data.data + n * data.row_stride + bytes * kGroup * g;
      std::array<float, kGroup> x;
      for (int32_t i = 0; i < kGroup; ++i) x[i] = number(from, row + bytes * i);
      if (!round_group(x, eight, single, out)) fits.store(false, std::memory_order_relaxed);
    });
    packer.finish();
    return fits ? std::move(packed) : nullptr;
  };
  auto packed = rounded(false);
  return packed ? std::move(packed) : rounded(true);
}

// ---------------------------------------------------------------- back

void unpack_row(const Weight& weight, int32_t row, float* out) {
  const uint8_t* at = weight.data + row / kPanel * weight.panel_bytes;
  const int32_t lane = row % kPanel;
  if (weight.scales == Scales::none) {
    const int64_t bytes = number_bytes(weight.codes);
    for (int32_t k = 0; k < weight.columns; ++k) {
      out[k] = number(weight.codes, at + bytes * (static_cast<int64_t>(kPanel) * k + lane));
    }
    return;
  }
  const auto half = [&](const uint8_t* p) { return number(Codes::f16, p + 2 * lane); };
  const auto single = [&](const uint8_t* p) { return number(Codes::f32, p + 4 * lane); };
  const int32_t groups = weight.columns / kGroup;
  for (int32_t start = 0; start < groups; start += weight.groups) {
    const bool singles = weight.scales == Scales::single || weight.scales == Scales::singles;
    const float block_scale = singles ? single(at) : half(at);
    float block_minimum = 0.0f;
    if (weight.scales == Scales::singles) block_minimum = single(at + 4 * kPanel);
    if (weight.scales == Scales::halves || weight.scales == Scales::k4) block_minimum = half(at + 2 * kPanel);
    at += header_bytes(weight.scales);
    const int32_t stop = std::min(groups, start + weight.groups);
    for (int32_t g = start; g < stop; ++g) {
      float scale[2] = {block_scale, block_scale}, minimum = block_minimum;
      if (weight.scales == Scales::k4) {
        scale[0] = scale[1] = block_scale * static_cast<float>(at[lane]);
        minimum = -(block_minimum * static_cast<float>(at[kPanel + lane]));
      }
      if (weight.scales == Scales::k6) {
        for (int32_t h = 0; h < 2; ++h) scale[h] = block_scale * static_cast<float>(static_cast<int8_t>(at[kPanel * h + lane]));
      }
      at += group_header_bytes(weight.scales);
      for (int32_t k = 0; k < kGroup; ++k) {
        const int32_t step = k / 4, place = 4 * lane + k % 4;
        int32_t code = 0;
        if (weight.codes == Codes::q8) {
          code = at[64 * step + place];
        } else {
          code = at[64 * (step % 4) + place] >> (step < 4 ? 0 : 4) & 15;
          if (weight.codes == Codes::q6) code |= (at[256 + 64 * (step / 4) + place] >> (2 * (step % 4)) & 3) << 4;
        }
        out[kGroup * g + k] = scale[k / 16] * static_cast<float>(code - weight.zero) + minimum;
      }
      at += code_bytes(weight.codes);
    }
  }
}

}  // namespace headrace
