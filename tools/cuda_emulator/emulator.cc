#include "emulator.h"

namespace emulator {

dim3 block_size, grid_size;
Fiber* self;
std::vector<Meeting> warps;

namespace {

// A block's on Hopper, as which cudaDeviceGetAttribute below presents itself unless it is told otherwise.
constexpr size_t kMostShared = 227 * 1024;
constexpr size_t kStack = 64 * 1024;

ucontext_t scheduler;
std::vector<Fiber> fibers;
const std::function<void()>* kernel;
int running;
std::vector<char*> memories;  // of the cluster's blocks

// Where threads wait for each other.
struct Barrier {
  int waiting = 0, alive = 0;
  long generation = 0;
  void open() {
    waiting = 0;
    ++generation;
  }
};
std::vector<Barrier> blocks;
Barrier cluster;

void leave(Barrier& barrier) {
  if (--barrier.alive && barrier.waiting == barrier.alive) barrier.open();
}

void enter() {
  (*kernel)();
  self->done = true;
  --running;
  leave(blocks[self->rank]);
  leave(cluster);
  yield();
}

void start(Fiber& fiber, int index, uint3 block, int rank) {
  if (fiber.stack.empty()) fiber.stack.resize(kStack);
  fiber.pending.clear();
  fiber.groups.clear();
  fiber.uncommitted.clear();
  fiber.products.clear();
  fiber.done = false;
  fiber.thread = uint3{unsigned(index), 0, 0};
  fiber.block = block;
  fiber.rank = rank;
  fiber.shared = memories[rank];
  fiber.warp = rank * int((block_size.x + 31) / 32) + index / 32;
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
  while (running) {
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
  Barrier& barrier = blocks[self->rank];
  const long before = barrier.generation;
  if (++barrier.waiting == barrier.alive) {
    barrier.open();
  } else {
    while (barrier.generation == before) yield();
  }
}

// A thread that has arrived goes on; it waits for the generation that it was part of.
void cluster_arrive() {
  self->arrived = cluster.generation;
  if (++cluster.waiting == cluster.alive) cluster.open();
}

void cluster_wait() {
  while (cluster.generation == self->arrived) yield();
}

const char* shared_of(int rank) { return memories.at(rank); }

void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body, int size) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.x % size) fail("a grid that no GPU takes");
  if (shared_bytes > kMostShared) fail("more shared memory than a GPU has");
  grid_size = grid;
  block_size = threads;
  kernel = &body;
  fibers.resize(threads.x * size);
  std::vector<std::vector<char>> memory(size, std::vector<char>(shared_bytes + 1024));
  memories.clear();
  for (auto& bytes : memory)
    memories.push_back(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.data()) + 1023) / 1024 * 1024));
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += size) {
      warps.assign((threads.x + 31) / 32 * size, Meeting());
      running = int(threads.x) * size;
      cluster = Barrier{0, running, cluster.generation};
      blocks.assign(size, Barrier{0, int(threads.x), 0});
      for (int rank = 0; rank < size; ++rank) {
        std::memset(memories[rank], 0xFF, shared_bytes);
        for (unsigned i = 0; i < threads.x; ++i)
          start(fibers[rank * threads.x + i], int(i), uint3{x + rank, y, 0}, rank);
      }
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
  const char* major = std::getenv("SPECQUANT_CUDA_EMULATED_MAJOR");
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? (major ? std::atoi(major) : 9)
           : attribute == cudaDevAttrMultiProcessorCount  ? 8
                                                          : 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
