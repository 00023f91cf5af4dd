// Weights as checkpoints hold them -> the panels that isa/linear.h reads.
//
//   a panel   16 rows. Plain numbers: column after column, the 16 rows' numbers of one column together.
//   codes     blocks of `groups` groups of 32 columns: header (scales of 16 rows, minima), then each group: its own
//             header, and its codes. Four columns of a row lie together, 16 rows make 64 bytes: a step. A group has
//             eight steps.
//   q8        step after step, a byte a code
//   q4        64 bytes hold step j in their low nibbles and step j + 4 in their high ones, j = 0 … 3
//   q6        the low nibbles as in q4, then 64 bytes of upper bits for steps 0 … 3 (step j in bits 2j and 2j + 1)
//             and 64 bytes for steps 4 … 7
//
// Codes are unsigned; `zero` says which one means 0 where there is no minimum.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace headrace {

// Zeros that take no memory until they are written; `huge`: on huge pages where the system has them.
class Bytes {
 public:
  explicit Bytes(int64_t size, bool huge = false);
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    int64_t size;
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_;
};

// A part of a chunk of memory.
class Piece {
 public:
  Piece(std::shared_ptr<Bytes> chunk, int64_t offset, int64_t size)
      : chunk_(std::move(chunk)), offset_(offset), size_(size) {}
  uint8_t* data() { return chunk_->data() + offset_; }
  int64_t size() const { return size_; }

 private:
  std::shared_ptr<Bytes> chunk_;
  int64_t offset_, size_;
};

// Threads that pack, and the memory they pack into: weights lie one behind the other in large chunks, so that even
// small ones get huge pages, and reading one weight runs into the next.
//
// Work may go on behind its caller, on all threads but one; whoever waits for it takes part.
class Packer {
 public:
  // What is done for [begin, end) of a count. Throws nothing.
  using Work = std::function<void(int64_t begin, int64_t end)>;

  explicit Packer(int32_t threads);
  ~Packer();  // forgets what has not begun
  Packer(const Packer&) = delete;
  Packer& operator=(const Packer&) = delete;

  Piece take(int64_t size);

  // Adds work for 0 … count, in parts of `grain`; `size`: bytes that it writes; `last` comes after its last part.
  // Returns at once, but while more than `kMostBehind` bytes wait.
  void add(int64_t count, int64_t grain, int64_t size, Work work, std::function<void()> last = {});
  // Returns when all is done.
  void finish();
  // Keeps what the work reads until `let_go` or its own end. (Whose deleters may want a lock that workers have not.)
  void hold(std::shared_ptr<const void> what) { held_.push_back(std::move(what)); }
  void let_go() { held_.clear(); }

  static constexpr int64_t kMostBehind = int64_t{128} << 20;

 private:
  struct Task {
    int64_t count, grain, size;
    Work work;
    std::function<void()> last;
    int64_t next = 0, done = 0;
  };
  bool step(std::unique_lock<std::mutex>& lock);
  void serve();

  std::shared_ptr<Bytes> chunk_;
  int64_t used_ = 0;
  std::vector<std::shared_ptr<const void>> held_;

  std::mutex mutex_;
  std::condition_variable added_, done_;
  std::deque<std::shared_ptr<Task>> queue_;  // those with parts that nobody has taken
  int64_t waiting_ = 0;                      // bytes of all that is not done
  bool ending_ = false;
  std::vector<std::thread> workers_;
};

struct PackedWeight {
  Weight weight;
  Piece bytes;
  std::string scheme;  // what it was packed from
};

// One plane of a tensor: the bytes of row n, group g begin at data + n × row_stride + g × group_stride.
struct Plane {
  const uint8_t* data;
  int64_t row_stride;
  int64_t group_stride;
  int64_t rows = 0, groups = 0, bytes = 0;  // how many there are, and bytes of a group; of a GGUF scheme's only
};

// Rows of plain numbers: source type f32, f16 or bf16, packed as `to`. Strides in bytes.
std::unique_ptr<PackedWeight> pack_numbers(Packer& packer, Codes from, Codes to, Plane data, int32_t rows,
                                           int32_t columns);

// A GGUF scheme (q4_0, q4_1, q5_0, q5_1, q8_0, q3_K, q4_K, q5_K, q6_K), by its planes in the order of its record;
// row n is row order[n] of them, or n where there is no order. Null for a scheme that has no kernel, or a row that is not whole
// groups. Throws std::invalid_argument where planes or order are not the scheme's.
//
// The packer goes on with it behind the caller: the planes must stay until `packer.finish()`. `file`: all of the file,
// mapped to be read, that they are views of (or nothing): its pages are given back once they are packed.
std::unique_ptr<PackedWeight> pack_blocks(Packer& packer, const std::string& scheme, const std::vector<Plane>& planes,
                                          const std::vector<int64_t>& order, int32_t rows, int32_t columns,
                                          std::span<const uint8_t> file);

// Numbers with a plane of scales: codes [row][column] 0 … 255 (bits 8) or 0 … 15 (bits 4), scales and minima
// [row][column / group] in float32; minima may be null, then `zero` is what means 0. group: a multiple of 32.
std::unique_ptr<PackedWeight> pack_scaled(Packer& packer, int32_t bits, const uint8_t* codes, const float* scales,
                                          const float* minima, int32_t zero, int32_t group, int32_t rows,
                                          int32_t columns);

// Rounds plain numbers to groups of 32 columns. bits 8: scale = max|w| / 127, codes -127 … 127. bits 4: scale =
// (max - min) / 15 and a minimum. Scales and minima are rounded to f16 first, outwards, then the codes to nearest: no
// number moves by more than half a step. Where one of them is too large for f16, all of the weight's are float32.
// A group with a number that is not finite becomes NaN.
std::unique_ptr<PackedWeight> quantise_numbers(Packer& packer, int32_t bits, Codes from, Plane data, int32_t rows,
                                               int32_t columns);

// Row `row` as float32, scale × (code - zero) + minimum.
void unpack_row(const Weight& weight, int32_t row, float* out);

}  // namespace headrace
