// Half-precision numbers in plain C++.
#pragma once

#include <bit>
#include <cstdint>

namespace headrace {

inline float half_value(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  if ((h & 0x7C00u) == 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | rest);
  const float size = std::bit_cast<float>(rest) * 0x1p112f;  // moves the exponent, of subnormal numbers too
  return sign ? -size : size;
}

// To nearest, ties to even; too large a number becomes infinity.
inline uint16_t half_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return sign | 0x7E00u;
  if (size >= 0x477FF000u) return sign | 0x7C00u;
  if (size < 0x38800000u) {  // subnormal: adding 0.5 puts the bits at the bottom, rounded
    const float shifted = std::bit_cast<float>(size) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3F000000u);
  }
  const uint32_t rounded = size + 0xFFFu + ((size >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline float bf16_value(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

inline uint16_t bf16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace headrace
