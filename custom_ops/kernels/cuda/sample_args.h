// What the kernels of sample.cu are given. Host only, but for the structures.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specquant_cuda {

constexpr int kSampleThreads = 256;
constexpr int kSampleBlocks = kSampleThreads;  // of a row at most: a thread of the last one reads what one left
constexpr int kSampleSlice = 1024;             // logits of a block at least
constexpr int kSampleBins = 2048;              // of a histogram

// What a block found: its largest logit and where, or infinity at −1 if one is not finite; the sum of what it kept.
struct SamplePart {
  float largest;
  int token;
  double sum;
};

// What is known of a row. arrived and histogram are zeros between kernels.
struct SampleRow {
  double uniform;
  float largest;
  int token;
  unsigned prefix;  // the leading bits of the key of the k-th largest logit, as far as they are known
  int left;         // which largest it is among those that begin with them
  int arrived;
  int histogram[kSampleBins];
  SamplePart part[kSampleBlocks];
};

struct SampleArgs {
  int vocab, slice, top_k;
  float temperature;
  int half;
  int64_t stride, width;
  const void* logits;
  const double* uniforms;
  int64_t *ids, *position_ids, *attention_mask, *results;
  SampleRow* row;  // [rows]
};

// early: kernels may start before the one before them has ended (compute capability 9.0).
cudaError_t sample(const SampleArgs& args, dim3 grid, bool early, cudaStream_t stream);

}  // namespace specquant_cuda
