#include "emulator.h"

namespace emulator {

uint3 block;
dim3 block_size, grid_size;
char* shared;
Fiber* self;
std::vector<Meeting> warps;

namespace {

// A block's on the smallest GPU that the kernels are for, and, for those with a block a multiprocessor, on Hopper.
constexpr size_t kMostShared = 99 * 1024, kMostShared90 = 227 * 1024;
constexpr size_t kStack = 128 * 1024;

ucontext_t scheduler;
std::vector<Fiber> fibers;
const std::function<void()>* kernel;
int waiting, alive;
long generation;

void open_barrier() {
  waiting = 0;
  ++generation;
}

void enter() {
  (*kernel)();
  self->done = true;
  if (--alive && waiting == alive) open_barrier();
  yield();
}

void start(Fiber& fiber, int index) {
  if (fiber.stack.empty()) fiber.stack.resize(kStack);
  fiber.pending.clear();
  fiber.groups.clear();
  fiber.uncommitted.clear();
  fiber.products.clear();
  fiber.done = false;
  fiber.thread = uint3{unsigned(index), 0, 0};
  fiber.warp = index / 32;
  fiber.lane = index % 32;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

// Until all are done: a round forwards or backwards, from a random thread.
void run_all() {
  const int count = int(fibers.size());
  while (alive) {
    const int first = std::rand() % count;
    const bool backwards = std::rand() & 1;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[((backwards ? count - 1 - i : i) + first) % count];
      if (fiber.done) continue;
      self = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
  }
}

}  // namespace

void yield() { swapcontext(&self->context, &scheduler); }

void sync_threads() {
  const long before = generation;
  if (++waiting == alive) {
    open_barrier();
  } else {
    while (generation == before) yield();
  }
}

void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("a grid that no GPU takes");
  if (shared_bytes > (threads.x == 384 ? kMostShared90 : kMostShared)) fail("more shared memory than every GPU has");
  grid_size = grid;
  block_size = threads;
  kernel = &body;
  fibers.resize(threads.x);
  std::vector<char> memory(shared_bytes + 1024);
  shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block = uint3{x, y, 0};
      warps.assign((threads.x + 31) / 32, Meeting());
      waiting = 0;
      alive = int(threads.x);
      std::memset(shared, 0xFF, shared_bytes);
      for (unsigned i = 0; i < threads.x; ++i) start(fibers[i], int(i));
      run_all();
    }
}

}  // namespace emulator

// The part of the runtime library that the kernels' host side calls.
extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 8 : 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
