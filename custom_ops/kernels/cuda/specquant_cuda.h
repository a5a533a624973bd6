/* The CUDA kernels of the op set (docs/ops.md, docs/cuda.md): a C API on device pointers and a stream.
 *
 * Symbols: N in-features, M out-features, r columns of the basis, T tokens, G weight groups,
 * P = ceil(M / 16) panels, Q = ceil(N / 8) blocks. All arrays lie on the GPU, contiguous, row by row.
 */
#ifndef SPECQUANT_CUDA_H
#define SPECQUANT_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPECQUANT_CUDA_ABI 8

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
  int32_t prologue;      /* 0: none; 1: rms_norm */
  int32_t gate;          /* 0: none; 1: silu, 2: gelu by tanh: y[i] = act(output 2i) . output 2i + 1 */
  float act_clip;        /* share of a group's range that the levels span, in (0, 1] */
  float epsilon;         /* of rms_norm */
  const void* x;         /* [T, N] */
  const void* basis;     /* float16 [N, r], or null */
  const void* coef;      /* float16 [r, M] */
  const void* qweight;   /* [P, Q, 64], two nibbles a byte */
  const void* group_scales; /* [P, G, 8], 16 nibbles: 1 less than a group's scale */
  const void* scales;    /* float16 [M] */
  const float* bias;     /* [M], or null */
  const float* norm;     /* [N], of rms_norm */
  const void* residual;  /* [T, M], added to y, which it may be but not overlap otherwise; or null, as with a gate */
  void* y;               /* [T, M], with a gate [T, M / 2] */
} SpecquantCudaProblem;

/* What the first stage leaves in the workspace, as byte offsets (-1: not there). Tests read it. */
typedef struct SpecquantCudaLayout {
  int64_t rotated;  /* float32 [T, N]: x after prologue and Hadamard transform, where there is one of them */
  int64_t reduced;  /* float32 [T, N]: x less the branch's part, when it is kept */
  int64_t partial;  /* float32 [splits, T, rank_padded]: shares of low */
  int64_t low;      /* float16 [T, 2, rank_padded]: leading and trailing bits of low / low_factor */
  int64_t low_factor; /* float32 [T] */
  int64_t levels;   /* int8 [T, features_padded], less their zero-point, or float16 where act_bits is 16: u / scale */
  int64_t scale;    /* float32 [segments, tokens_padded] */
  int64_t bytes;    /* of the whole workspace */
  int64_t tokens_padded, features_padded, rank_padded, segments, splits;
} SpecquantCudaLayout;

/* One call of SpectralBranch: low = x . B[:, :rank], y = low . C. library_cuda_branch.py mirrors it. */
typedef struct SpecquantCudaBranch {
  int64_t tokens;        /* T >= 0 */
  int64_t in_features;   /* N */
  int64_t out_features;  /* M */
  int64_t basis_rank;    /* r, the columns stored */
  int64_t rank;          /* columns used, 0..r */
  int32_t half;          /* 1: x, y and low are float16; 0: float32 */
  const void* x;         /* [T, N] */
  const void* basis;     /* float16 [N, r], or null where r is 0, as coef and low */
  const void* coef;      /* float16 [r, M] */
  void* y;               /* [T, M] */
  void* low;             /* [T, r]; zeros from column rank on */
} SpecquantCudaBranch;

/* One call of Int4KVAttention, or of HalfKVAttention where half_cache is set. Symbols: B batch, S new tokens of a row
 * (padding included), H query heads, K kv heads, d head_dim, P and T rows of the cache before and after,
 * E = d/2 + 4 bytes of a cache row, or 2 d. library_cuda_attention.py mirrors it. */
typedef struct SpecquantCudaAttention {
  int64_t batch;         /* B; B * K at most 65535 */
  int64_t sequence;      /* S */
  int64_t past_rows;     /* P */
  int64_t present_rows;  /* T >= P */
  int64_t num_heads;     /* H */
  int64_t kv_num_heads;  /* K, divides H */
  int64_t head_dim;      /* d */
  int64_t context;       /* rows of cos and sin */
  int64_t rotary;        /* their columns; twice as many features turn */
  int64_t window;        /* tokens a query sees, itself included; <= 0: all */
  int32_t hadamard;      /* 1: queries and keys pass a Hadamard transform; 0 with half_cache */
  int32_t half;          /* 1: qkv and y are float16; 0: float32 */
  int32_t half_cache;    /* 1: cache rows are d float16; 0: packed */
  float scale;           /* what q . k is multiplied by; 0: 1 / sqrt(d) */
  float clip;            /* share of a packed row's range that its levels span, in (0, 1] */
  const void* qkv;           /* [B, S, (H + 2K) d] */
  const void* past_key;      /* [B, K, P, E]; cache rows are aligned to 4 bytes */
  const void* past_value;
  const int32_t* seqlens_k;  /* [B]: tokens of a row, the new ones included, less one */
  const int64_t* position_ids; /* [B, S]: rows of cos and sin */
  const float* cos;          /* [context, rotary] */
  const float* sin;
  const float* key_offset;   /* [K, d], or null with half_cache */
  void* present_key;         /* [B, K, T, E]; may be past_key itself if T == P */
  void* present_value;
  void* y;                   /* [B, S, H d]; zeros for padding */
} SpecquantCudaAttention;

/* The end of a step of decoding: a token id for each row of logits, and what the next step is given. Symbols: R rows,
 * V words of the vocabulary, W columns of the mask. library_cuda_sample.py mirrors it. */
typedef struct SpecquantCudaSample {
  int64_t rows;          /* R, 0..65535 */
  int64_t vocab;         /* V, 1..2^24 */
  int64_t stride;        /* elements from one row of logits to the next, >= V */
  int64_t top_k;         /* only the k largest logits are drawn from, and what equals the least of them; 0: from all */
  int64_t width;         /* W */
  int32_t half;          /* 1: logits are float16; 0: float32 */
  float temperature;     /* 0: greedy, of equal logits the first */
  const void* logits;    /* [R, stride] */
  const double* uniforms; /* [R], in [0, 1), where temperature is not 0: the token is where the sum of the weights, in the
                            order of the vocabulary, exceeds this share of all. May be pinned memory of the host. */
  int64_t* ids;          /* [R]: the tokens, as the next input_ids; 0 for -1 */
  int64_t* position_ids; /* [R]: 1 is added; or null */
  int64_t* attention_mask; /* [R, W]: 1 at the new position, if that is < W; or null */
  int64_t* results;      /* [R]: the tokens; -1 for a row with NaN or infinite logits. May be pinned memory of the host. */
} SpecquantCudaSample;

int32_t specquant_cuda_abi(void);
int64_t specquant_cuda_problem_size(void);
int64_t specquant_cuda_attention_size(void);
int64_t specquant_cuda_layout_size(void);
int64_t specquant_cuda_branch_size(void);
int64_t specquant_cuda_sample_size(void);

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
 * `path` chooses the second stage: null or "" the fastest that fits, else "cluster" or "matvec" (T <= 32), "gemm_small",
 * "gemm_large", "wgmma_small", "wgmma_large", "wgmma_wide" (compute capability 9.0) or "any", the slow one that takes every
 * shape (docs/cuda.md says what the others take). */
const char* specquant_cuda_matmul(const SpecquantCudaProblem* problem, void* workspace, int64_t workspace_bytes,
                                  void* stream, const char* path);

/* Sizes of a call of SpectralBranch; its pointers may be null still. */
const char* specquant_cuda_check_branch(const SpecquantCudaBranch* problem);

/* Bytes of workspace that suffice on every GPU, for the problem's tokens and any fewer. Asks no device. */
const char* specquant_cuda_branch_workspace(const SpecquantCudaBranch* problem, int64_t* bytes);

/* y and low, in float32 until they are stored, as specquant_cuda_matmul does its work. */
const char* specquant_cuda_branch(const SpecquantCudaBranch* problem, void* workspace, int64_t workspace_bytes,
                                  void* stream);

/* Sizes, attributes and pointers of a call of attention; present_key, present_value and y may be null still. What lies
 * on the GPU is not looked at: of a row whose seqlens_k does not fit the cache nothing is written and y is NaN, and a
 * position that is not in the tables makes its token's y and key NaN. */
const char* specquant_cuda_check_attention(const SpecquantCudaAttention* problem);

/* Bytes of workspace of a sound call on the current device. */
const char* specquant_cuda_attention_workspace(const SpecquantCudaAttention* problem, int64_t* bytes);

/* Bytes of workspace that suffice on every GPU, for the problem's batch, tokens and rows of the cache and any fewer. Asks
 * no device, and looks at no pointer. */
const char* specquant_cuda_attention_bound(const SpecquantCudaAttention* problem, int64_t* bytes);

/* Appends the new keys and values to the cache and computes y, as specquant_cuda_matmul does its work. */
const char* specquant_cuda_attention(const SpecquantCudaAttention* problem, void* workspace, int64_t workspace_bytes,
                                     void* stream);

/* Bytes of workspace for the problem's rows and any fewer, for any vocabulary. Asks no device, and looks at no pointer. */
const char* specquant_cuda_sample_workspace(const SpecquantCudaSample* problem, int64_t* bytes);

/* ids and results, as specquant_cuda_matmul does its work. `workspace` must hold zeros before the first call that it is
 * given to; every call leaves it fit for the next, of whatever sizes. */
const char* specquant_cuda_sample(const SpecquantCudaSample* problem, void* workspace, int64_t workspace_bytes,
                                  void* stream);

#ifdef __cplusplus
}
#endif
#endif
