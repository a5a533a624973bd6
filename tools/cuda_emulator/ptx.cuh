// The instructions of kernels/cuda/ptx.cuh by their definition in the PTX manual, lane by lane.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

inline float half_of(uint32_t word, int which) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(word >> 16 * which);
  return __half2float(__half(raw));
}
inline float tf32_of(uint32_t word) { return emulator::bits_as<float>(word & 0xFFFFE000u); }

struct Operands {
  const uint32_t* a;
  const uint32_t* b;
};

// d = A · B + d, both gathered from the lanes: A [16, K] from 4 registers, B [K, 8] from 2, `each` values a register,
// K = 8 · each, value(word, i) the i-th of a word.
template <int each, class Value, class Sum, class Wide, class Read>
void multiply_add(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Wide, Read read) {
  Operands operands{a, b};
  emulator::together(&operands, d, [read](void** in, void** out) {
    constexpr int K = 8 * each;
    static Value A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& from = *static_cast<Operands*>(in[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < each; ++i) {
        for (int j = 0; j < 4; ++j) A[g + j % 2 * 8][j / 2 * 4 * each + each * t + i] = read(from.a[j], i);
        for (int j = 0; j < 2; ++j) B[j * 4 * each + each * t + i][g] = read(from.b[j], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        Sum& result = static_cast<Sum*>(out[lane])[j];
        Wide sum = result;
        for (int k = 0; k < K; ++k) sum += Wide(A[lane / 4 + j / 2 * 8][k]) * B[k][lane % 4 * 2 + j % 2];
        result = Sum(sum);
      }
  });
}

inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
  const int start[4] = {c[0], c[1], c[2], c[3]};
  std::memcpy(d, start, sizeof d);
  multiply_add<4, int8_t>(d, a, b, int(), [](uint32_t word, int i) { return int8_t(word >> 8 * i); });
}

inline void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Both {
    const uint32_t *a, *b;
  } both{a, b};
  emulator::together(&both, d, [](void** in, void** out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        int& sum = static_cast<int*>(out[lane])[j];
        const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
        for (int k = 0; k < 32; ++k) {
          const Both& rows = *static_cast<Both*>(in[row % 8 * 4 + k / 4 % 4]);
          const Both& columns = *static_cast<Both*>(in[column * 4 + k / 4 % 4]);
          sum += int(uint8_t(rows.a[row / 8 + k / 16 * 2] >> k % 4 * 8)) * int8_t(columns.b[k / 16] >> k % 4 * 8);
        }
      }
  });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add<2, float>(d, a, b, double(), [](uint32_t word, int i) { return half_of(word, i); });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) { mma_f16(d, {a[0], a[1], 0, 0}, {b, 0}); }

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add<1, float>(d, a, b, double(), [](uint32_t word, int) { return tf32_of(word); });
}

// Aborts on a bank conflict, too. read(in, i, lane): the word of matrix i that this lane gets.
template <class Read>
void load_matrices(uint32_t (&d)[4], const void* shared, Read read) {
  emulator::together(const_cast<void*>(shared), d, [read](void** in, void** out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(out[lane])[i] = read(in + 8 * i, lane / 4, lane % 4);
    for (int i = 0; i < 4; ++i) {
      int banks = 0;
      for (int row = 0; row < 8; ++row)
        banks |= 1 << (static_cast<const char*>(in[8 * i + row]) - emulator::self->shared) / 16 % 8;
      if (banks != 255) emulator::fail("ldmatrix with a bank conflict");
    }
  });
}

inline uint32_t transposed(uint32_t v) {
  uint32_t d;
  emulator::together(&v, &d, [](void** in, void** out) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint32_t result = 0;
      for (int i = 0; i < 2; ++i)
        result |= (*static_cast<uint32_t*>(in[(2 * t + i) * 4 + g / 2]) >> 16 * (g % 2) & 0xFFFF) << 16 * i;
      *static_cast<uint32_t*>(out[lane]) = result;
    }
  });
  return d;
}

inline void load_matrices(uint32_t (&d)[4], const void* shared) {
  load_matrices(d, shared, [](void** rows, int g, int t) { return static_cast<const uint32_t*>(rows[g])[t]; });
}

inline void load_transposed(uint32_t (&d)[4], const void* shared) {
  load_matrices(d, shared, [](void** rows, int g, int t) {
    const auto at = [rows, g](int row) { return uint32_t(static_cast<const uint16_t*>(rows[row])[g]); };
    return at(2 * t + 1) << 16 | at(2 * t);
  });
}

inline void copy_async_of(int bytes, void* shared, const void* global, bool there) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (there && reinterpret_cast<uintptr_t>(global) % bytes))
    emulator::fail("cp.async of a misaligned address");
  emulator::self->pending.push_back({shared, global, there, bytes});
}

inline void copy_async(void* shared, const void* global, bool there) { copy_async_of(16, shared, global, there); }
inline void copy_async_8(void* shared, const void* global, bool there) { copy_async_of(8, shared, global, there); }

inline void commit_async() {
  emulator::self->groups.push_back(std::move(emulator::self->pending));
  emulator::self->pending.clear();
}

template <int pending>
void wait_async() {
  auto& groups = emulator::self->groups;
  while (int(groups.size()) > pending) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.there) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

inline uint4 load_stream(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("a misaligned load of 16 bytes");
  return *static_cast<const uint4*>(global);
}

inline void prefetch_line(const void*) {}

inline float power_of_two(float v) { return std::exp2(v); }
inline float reciprocal_of(float v) { return 1.0f / v; }
inline void prefetch(const void*) {}
inline void let_next_start() {}
inline void wait_for_previous() {}

inline float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline uint32_t bits_of(__half2 v) { return emulator::bits_as<uint32_t>(v); }
inline __half2 half2_of(uint32_t v) { return emulator::bits_as<__half2>(v); }

}  // namespace specquant_cuda
