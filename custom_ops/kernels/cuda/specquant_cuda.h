/* The CUDA kernels of the op set (docs/ops.md, docs/cuda.md): a C API on device pointers and a stream.
 *
 * Symbols: N in-features, M out-features, r columns of the basis, T tokens, G weight groups, S segments,
 * P = ceil(M / 16) panels, Q = ceil(N / 8) blocks. All arrays lie on the GPU, contiguous, row by row.
 */
#ifndef SPECQUANT_CUDA_H
#define SPECQUANT_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPECQUANT_CUDA_ABI 1

/* One call of SpecQuantMatMul, or of Int4ResidualMatMul when basis is null. library_cuda.py mirrors it. */
typedef struct SpecquantCudaProblem {
  int64_t tokens;        /* T >= 0 */
  int64_t in_features;   /* N */
  int64_t out_features;  /* M */
  int64_t basis_rank;    /* r, the columns stored */
  int64_t rank;          /* columns used, 0..r */
  int64_t group_size;    /* features per weight scale; 0: all N */
  int64_t act_group;     /* features per activation scale; 0: all N */
  int64_t hadamard;      /* features of a Hadamard transform that x passes through first; 0: none */
  int32_t act_bits;      /* 2..8, or 16: activations are not quantised */
  int32_t subtract;      /* 1: the branch's part of x is removed before it is quantised */
  int32_t half;          /* 1: x and y are float16; 0: float32 */
  int32_t wide_sums;     /* 1: row_sums is int32; 0: int16 */
  float act_clip;        /* share of a group's range that the levels span, in (0, 1] */
  const void* x;         /* [T, N] */
  const void* basis;     /* float16 [N, r], or null */
  const void* coef;      /* float16 [r, M] */
  const void* qweight;   /* [P, Q, 64], two nibbles a byte */
  const void* scales;    /* float16 [G, M] */
  const void* row_sums;  /* [S, M] */
  const float* bias;     /* [M], or null */
  void* y;               /* [T, M] */
} SpecquantCudaProblem;

/* What the first stage leaves in the workspace, as byte offsets (-1: not there). Tests read it. */
typedef struct SpecquantCudaLayout {
  int64_t rotated;  /* float32 [T, N]: x after the Hadamard transform */
  int64_t reduced;  /* float32 [T, N]: x less the branch's part, when it is kept */
  int64_t partial;  /* float32 [splits, T, rank_padded]: shares of low */
  int64_t low;      /* float16 [T, 2, rank_padded]: leading and trailing bits of low / low_factor */
  int64_t low_factor; /* float32 [T] */
  int64_t levels;   /* int8 [T, features_padded], or float16 where act_bits is 16: u / scale */
  int64_t scale;    /* float32 [segments, tokens_padded], times level_unit; one row where act_bits is 16 */
  int64_t zero;     /* int32 [segments, tokens_padded], less 128: act_bits 8 only */
  int64_t bytes;    /* of the whole workspace */
  int64_t tokens_padded, features_padded, rank_padded, segments, splits;
  float level_unit; /* 1/16 where a sum of 16 times the weights is folded in float, else 1 */
} SpecquantCudaLayout;

int32_t specquant_cuda_abi(void);
int64_t specquant_cuda_problem_size(void);
int64_t specquant_cuda_layout_size(void);

/* Each returns null if all is well, else one line that says what is wrong, valid until this thread's next call. */

/* The current device: is there one, and can it run these kernels? */
const char* specquant_cuda_device(void);

/* Sizes, attributes and pointers, before anything is read. y and x are looked at only by specquant_cuda_matmul. */
const char* specquant_cuda_check(const SpecquantCudaProblem* problem);

/* The workspace of a sound problem on the current device. */
const char* specquant_cuda_layout(const SpecquantCudaProblem* problem, SpecquantCudaLayout* layout);

/* Bytes of workspace that suffice on every GPU, for the problem's tokens and any fewer, wherever its arrays lie. Asks no
 * device, and looks at no pointer but for whether basis_rank says that there is a branch. */
const char* specquant_cuda_workspace(const SpecquantCudaProblem* problem, int64_t* bytes);

/* y of the problem, in order on `stream` (a cudaStream_t); nothing waits and nothing is allocated, so the call can be
 * captured in a graph. `workspace` (256-byte aligned) has at least the bytes of the layout; its content is lost.
 * `path` chooses the second stage: null or "" the fastest that fits, else "matvec" (T <= 32), "gemm_small",
 * "gemm_large" or "any", the slow one that takes every shape. */
const char* specquant_cuda_matmul(const SpecquantCudaProblem* problem, void* workspace, int64_t workspace_bytes,
                                  void* stream, const char* path);

#ifdef __cplusplus
}
#endif
#endif
