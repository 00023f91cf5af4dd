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

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

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
class Packer {
 public:
  explicit Packer(int32_t threads) : threads(threads) {}
  Piece take(int64_t size);

  ThreadPool threads;

 private:
  std::shared_ptr<Bytes> chunk_;
  int64_t used_ = 0;
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

// A GGUF scheme (q4_0, q4_1, q5_0, q5_1, q8_0, q3_K, q4_K, q5_K, q6_K), by its planes in the order of its record.
// Null for a scheme that has no kernel, or a row that is not whole groups. Throws std::invalid_argument where the planes are
// not the scheme's.
std::unique_ptr<PackedWeight> pack_blocks(Packer& packer, const std::string& scheme,
                                          const std::vector<Plane>& planes, int32_t rows, int32_t columns);

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
