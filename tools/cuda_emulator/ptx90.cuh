// The instructions of kernels/cuda/ptx90.cuh. Bulk copies land when somebody waits for them, products of a warpgroup
// happen at its wait: what is read too early, or overwritten too soon, shows.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

struct BulkCopy {
  void* to;
  const void* from;
  uint32_t bytes;
};

// What stands behind the 8 bytes of a barrier.
struct Barrier {
  int count = 0, arrived = 0;
  int64_t bytes = 0;  // expected and not there yet
  uint32_t phase = 0;
  std::vector<BulkCopy> copies;
};

// The barriers of the one block that runs; the first of its kind to be initialised by a block forgets the last block's.
inline std::vector<Barrier> barriers;

inline Barrier& barrier_of(uint64_t* barrier) { return barriers[*barrier]; }

inline void barrier_init(uint64_t* barrier, int count) {
  *barrier = barriers.size();
  barriers.push_back({});
  barriers.back().count = count;
}

inline void barriers_ready() {}

inline void end_phase(Barrier& b) {
  if (b.arrived > b.count) emulator::fail("more arrivals at a barrier than it counts");
  if (b.arrived < b.count || b.bytes != 0) return;
  b.arrived = 0;
  ++b.phase;
}

inline void barrier_arrive(uint64_t* barrier) {
  ++barrier_of(barrier).arrived;
  end_phase(barrier_of(barrier));
}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  barrier_of(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  for (;;) {
    Barrier& b = barrier_of(barrier);
    if (b.phase % 2 != parity) return;
    if (!b.copies.empty()) {
      const size_t one = std::rand() % b.copies.size();
      std::memcpy(b.copies[one].to, b.copies[one].from, b.copies[one].bytes);
      b.bytes -= b.copies[one].bytes;
      b.copies.erase(b.copies.begin() + one);
      end_phase(b);
      continue;
    }
    emulator::yield();
  }
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes)
    emulator::fail("a misaligned bulk copy");
  barrier_of(barrier).copies.push_back({shared, global, bytes});
}

template <int count>
void take_registers() {}
template <int count>
void leave_registers() {}

inline void hold(int&) {}
inline void hold(uint32_t&) {}
inline void hold(int64_t&) {}
inline uint64_t wgmma_operand(const void* shared) {
  const size_t at = static_cast<const char*>(shared) - emulator::self->shared;
  if (at % 1024) emulator::fail("an operand of wgmma that is not aligned to 1024 bytes");
  return at >> 4;
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::self->products.push_back(std::move(emulator::self->uncommitted)); }

template <int sums>
void wgmma_s8(int (&d)[sums], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::self->uncommitted.push_back({d, {a[0], a[1], a[2], a[3]}, b, add, 2 * sums});
}

// One product: each warp's 16 rows by its own lanes' registers.
inline void multiply_product(emulator::Product* const (&lanes)[32]) {
  const int columns = lanes[0]->columns;
  int8_t A[16][32];
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i)
        A[lane / 4 + j % 2 * 8][j / 2 * 16 + lane % 4 * 4 + i] = int8_t(lanes[lane]->a[j] >> 8 * i);
  for (int column = 0; column < columns; ++column) {
    int8_t B[32];
    for (int piece = 0; piece < 2; ++piece) {  // the swizzle is of address bits: 4..6 by 7..9
      const size_t at = (lanes[0]->b << 4) + column * 128 + piece * 16;
      std::memcpy(B + piece * 16, emulator::self->shared + (at ^ (at >> 7 & 7) << 4), 16);
    }
    for (int row = 0; row < 16; ++row) {
      const emulator::Product& to = *lanes[row % 8 * 4 + column % 8 / 2];
      int& d = to.d[column / 8 * 4 + row / 8 * 2 + column % 2];
      int sum = to.add ? d : 0;
      for (int k = 0; k < 32; ++k) sum += A[row][k] * B[k];
      d = sum;
    }
  }
}

template <int pending>
void wgmma_wait() {
  emulator::together(emulator::self, nullptr, [](void** in, void**) {
    auto fiber = [in](int lane) -> emulator::Fiber& { return *static_cast<emulator::Fiber*>(in[lane]); };
    while (int(fiber(0).products.size()) > pending) {
      for (size_t i = 0; i < fiber(0).products.front().size(); ++i) {
        emulator::Product* lanes[32];
        for (int lane = 0; lane < 32; ++lane) lanes[lane] = &fiber(lane).products.front()[i];
        if (lanes[0]->form == emulator::Form::kBytes) {
          multiply_product(lanes);
        } else {
          fiber(0).multiply_halves(lanes, fiber(0).thread.x / 32 % 4);
        }
      }
      for (int lane = 0; lane < 32; ++lane) fiber(lane).products.erase(fiber(lane).products.begin());
    }
  });
}

}  // namespace specquant_cuda
