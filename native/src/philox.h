// Random numbers without state: Philox4x32-10 by (seed, output position, token id) (docs/CONTRACTS.md §2).
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), §4.3.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace headrace {

// Key: the seed's two's complement, low word first. Counter: (id / 4, position low, position high, 0).
inline std::array<uint32_t, 4> philox_words(uint64_t seed, uint64_t position, uint32_t group) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  std::array<uint32_t, 4> c{group, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0};
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{c[0]} * 0xD2511F53u;
    const uint64_t product1 = uint64_t{c[2]} * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The 32 random bits of a token id.
inline uint32_t uniform_word(uint64_t seed, uint64_t position, int32_t token_id) {
  const uint32_t id = static_cast<uint32_t>(token_id);
  return philox_words(seed, position, id / 4)[id % 4];
}

// Gumbel(0, 1) of a word: -ln(-ln((word + ½) / 2³²)).
inline double gumbel(uint32_t word) { return -std::log(-std::log((word + 0.5) / 4294967296.0)); }

}  // namespace headrace
